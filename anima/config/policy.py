"""The grammar of --recompute."""


def parse_policy(policy: str) -> tuple[str, int]:
    """What is recomputed (all, cheap, none, a number of layers as a whole), and of how many layers that which is kept
    waits in host memory.

    Without a slash of none. Behind it, the layers that are not recomputed as a whole come first, since they keep most:
    `cheap/30` is cheap with 30 layers away, `10/24` sends 24 of those behind the first 10. Only where these are used up
    do recomputed ones send what they keep, their input: 28 of them in `all/28`; in `10/60` of a model with 60 layers,
    all 50 others and 10 inputs.

    Raises:
        ValueError: it is no policy.
    """
    recompute, slash, away = policy.partition("/")
    known = recompute in ("all", "cheap", "none") or recompute.isdecimal()
    if not known or (slash and not away.isdecimal()):
        raise ValueError(policy)
    return recompute, int(away or 0)


def is_policy(policy: str) -> bool:
    """Whether --recompute knows it."""
    try:
        parse_policy(policy)
    except ValueError:
        return False
    return True
