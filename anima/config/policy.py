"""The grammar of --recompute."""


def parse_policy(policy: str) -> tuple[str, int]:
    """What is recomputed (all, cheap, none, a number of layers), and how many of the other layers wait in host memory.

    `cheap/30` is cheap with 30 layers in host memory; without a slash there are none.

    Raises:
        ValueError: it is no policy.
    """
    recompute, slash, away = policy.partition("/")
    known = recompute in ("all", "cheap", "none") or recompute.isdecimal()
    if not known or (slash and (recompute == "all" or not away.isdecimal())):
        raise ValueError(policy)
    return recompute, int(away or 0)


def is_policy(policy: str) -> bool:
    """Whether --recompute knows it."""
    try:
        parse_policy(policy)
    except ValueError:
        return False
    return True
