"""Finds secrets among option values before they reach a tracker or a file.

Knows nothing of which tracker; looks at values only, and never returns or prints one.
"""

import re
from collections.abc import Iterator, Mapping

_SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)$")
"""Names of environment variables whose value is a secret: HF_TOKEN, WANDB_API_KEY, OPENAI_API_KEY …"""

_SHORTEST_SECRET = 12
"""Characters; shorter values of such variables ("none", "dummy") would match by chance."""

_SECRET_SHAPES = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an OpenAI-style key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a password in a URL": re.compile(r"://[^/\s:@]*:[^/\s@]+@"),
}


def find_secret(options: Mapping[str, object], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The first option that holds a secret, as (option's name, what it seems to be); None if there is none.

    A bare hexadecimal string is no evidence: commit hashes look like W&B's old keys.
    """
    shapes = dict(_SECRET_SHAPES)
    for variable, secret in environment.items():
        if _SECRET_VARIABLE.search(variable) and len(secret) >= _SHORTEST_SECRET:
            shapes[f"the value of the environment variable {variable}"] = re.compile(re.escape(secret))
    for name, value in options.items():
        for text in _texts(value):
            for kind, pattern in shapes.items():
                if pattern.search(text):
                    return name, kind
    return None


def _texts(value: object) -> Iterator[str]:
    """All strings in an option's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
