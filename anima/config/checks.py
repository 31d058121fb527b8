"""The one check that every section of the schema uses."""

from anima.errors import ConfigError


def require(condition: bool, what: str, where: str, got: object, allowed: str) -> None:
    """Refuse a value that breaks a condition; `where` is the flag without its dashes.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(what, where=f"--{where}", got=repr(got), allowed=allowed)
