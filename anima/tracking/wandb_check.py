"""Can W&B start here? Answered in milliseconds, without network and without importing wandb.

Follows where wandb 0.31 looks for its mode, server and key (`wandb/sdk/lib/wbauth`, `settings_file.py`);
a test holds it against wandb itself.
"""

import configparser
import importlib.util
import netrc
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from anima.errors import TrackingError

FIXES = (
    "`export WANDB_MODE=offline` (upload later with `wandb sync`), `wandb login` or `export WANDB_API_KEY=…`, "
    "or `--tracker jsonl`"
)

_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
_MODES_WITHOUT_KEY = ("offline", "dryrun", "disabled")
_DEFAULT_URL = "https://api.wandb.ai"
_CLOUD_DOMAINS = ("wandb.ai", "coreweave.com")
"""W&B's own service has had several host names, and wandb takes a key for one of them at another."""

_SHORTEST_KEY = 40
"""Characters of a key behind its optional `prefix-`."""


def check_wandb(environment: Mapping[str, str]) -> None:
    """Find out whether `wandb.init` can work, as far as that shows without a network.

    Args:
        environment: Environment variables, normally `os.environ`.

    Raises:
        TrackingError: wandb is not installed, its mode is unknown, or it is online and there is no usable key.
    """
    if not _is_installed():
        raise TrackingError(
            "the package wandb is not installed",
            where="--tracker wandb",
            fix="`pip install wandb`, or `--tracker jsonl`",
        )
    settings = _settings(environment)
    mode = environment.get("WANDB_MODE", settings.get("mode", "online"))
    if mode not in _MODES:
        raise TrackingError(
            "unknown W&B mode", where="WANDB_MODE", got=repr(mode), allowed="online, offline or disabled", fix=FIXES
        )
    if mode not in _MODES_WITHOUT_KEY:
        _check_key(environment, settings)


def _is_installed() -> bool:
    spec = importlib.util.find_spec("wandb")
    # A folder `wandb` with earlier runs in it also imports, as an empty namespace package without a file.
    return spec is not None and spec.origin is not None


def _check_key(environment: Mapping[str, str], settings: Mapping[str, str]) -> None:
    if key := environment.get("WANDB_API_KEY"):
        return _check_shape(key, "WANDB_API_KEY")
    if environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    url = environment.get("WANDB_BASE_URL", settings.get("base_url", _DEFAULT_URL))
    path = _netrc_path(environment)
    password, problem = _netrc_password(path, url)
    if password:
        return _check_shape(password, path)
    if key := settings.get("api_key"):
        return _check_shape(key, "api_key in W&B's settings file")
    raise TrackingError(
        "W&B is asked for, but there is no API key",
        where="--tracker wandb",
        got=f"no WANDB_API_KEY, and {problem or f'no entry for {urlsplit(url).netloc} in {path}'}",
        fix=FIXES,
    )


def _check_shape(key: str, where: object) -> None:
    """Refuse a key that wandb will refuse, without ever printing it; three parts with dots are a JSON web token."""
    if re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", key):
        return
    secret = key.split("-", 1)[-1]
    if len(secret) < _SHORTEST_KEY or not re.fullmatch(r"[\w-]+", secret):
        raise TrackingError(
            "the W&B API key is malformed",
            where=where,
            got=f"{len(key)} characters",
            allowed=f"{_SHORTEST_KEY} or more letters, digits and underscores",
            fix=FIXES,
        )


def _netrc_password(path: Path, url: str) -> tuple[str | None, str | None]:
    """(password for the server at `url`, why the file could not be used); both None if it has no entry."""
    if not path.exists():
        return None, f"{path} does not exist"
    try:
        entries = netrc.netrc(str(path))
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read ({type(error).__name__})"
    for host in _hosts(url, entries.hosts):
        if (found := entries.authenticators(host)) and found[2]:
            return found[2], None
    return None, None


def _hosts(url: str, known: Mapping[str, object]) -> list[str]:
    parts = urlsplit(url)
    if _is_cloud(parts.hostname or ""):
        return [parts.netloc, *(host for host in known if _is_cloud(host))]
    return [parts.netloc]


def _is_cloud(host: str) -> bool:
    return any(host == domain or host.endswith(f".{domain}") for domain in _CLOUD_DOMAINS)


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment["HOME"]) if environment.get("HOME") else Path.home()


def _expand(text: str, environment: Mapping[str, str]) -> Path:
    return _home(environment) / text[2:] if text.startswith("~/") else Path(text)


def _netrc_path(environment: Mapping[str, str]) -> Path:
    if path := environment.get("NETRC"):
        return _expand(path, environment)
    home = _home(environment)
    windows_name = home / "_netrc"
    return windows_name if windows_name.exists() and not (home / ".netrc").exists() else home / ".netrc"


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Entries of W&B's settings files: the user's, overruled by the working folder's (`wandb offline` writes those)."""
    if folder := environment.get("WANDB_CONFIG_DIR"):
        user_file = _expand(folder, environment) / "settings"
    else:
        user_file = _home(environment) / ".config" / "wandb" / "settings"
    # wandb reads the files before the variables, so WANDB_DIR does not move this one.
    folder_file = Path(".wandb" if Path(".wandb").exists() else "wandb") / "settings"
    settings: dict[str, str] = {}
    for path in (user_file, folder_file):
        parser = configparser.ConfigParser()
        try:
            parser.read(path)
        except (OSError, configparser.Error, UnicodeDecodeError):
            # wandb warns about such a file and goes on without it.
            continue
        if parser.has_section("default"):
            settings.update(parser.items("default"))
    return settings
