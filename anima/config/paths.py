"""A name that a user gave, as a path: `~` is a home folder, which there may not be.

Path.expanduser raises RuntimeError where a home is not known, and that is no error for users: nothing else calls it.
"""

import os
from pathlib import Path

from anima.errors import ConfigError


def expanded(name: str | Path, where: str | None = None) -> Path:
    """The path with a leading `~` or `~user` replaced; arguments and errors are those of `with_home`."""
    return Path(with_home(str(name), where))


def with_home(name: str, where: str | None = None) -> str:
    """The text with a leading `~` or `~user` replaced.

    Args:
        name: A path, as it was written.
        where: The flag or key with it; None: the path has to tell.

    Raises:
        ConfigError: there is no such user, or this one has no home.
    """
    found = os.path.expanduser(name)
    if not found.startswith("~"):
        return found
    home = name.split("/", 1)[0]
    what = "the folder of this user is not known" if home == "~" else f"there is no user {home[1:]!r} on this machine"
    raise ConfigError(
        what,
        where=where or name,
        got=home,
        allowed="~ and ~user for home folders that exist; ./~name for a file of such a name",
        fix="set HOME, or write the path out" if home == "~" else "write the path out, or ~/… for your own folder",
    )
