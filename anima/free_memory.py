"""Host memory that this process may still take: of the machine, and of every control group that it belongs to.

Slurm's --mem and a container's limit are such groups. What takes more is killed by the kernel without a word, and what
the system reports as free knows nothing of them. The only user of psutil.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

GIB = 2**30
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)
"""Files of a group with a limit and what of it is used: two of version 2 (behind `high`, a process is slowed down until
it seems to hang), two of version 1 (the second with swap)."""
_FILE_CACHE = ({"total_active_file", "total_inactive_file"}, {"active_file", "inactive_file"})
"""Entries of memory.stat that the kernel drops before it kills: version 1 with the groups below, then version 2."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class FreeMemory:
    """What may be taken.

    Attributes:
        size: Bytes.
        limit: Bytes that the control group with the least room allows in all; None: the machine itself has less.
    """

    size: int
    limit: int | None = None

    def __str__(self) -> str:
        """As it belongs into a message."""
        free = f"{self.size / GIB:.1f} GiB free"
        return free if self.limit is None else f"{free} of the {self.limit / GIB:.1f} GiB that this job may use"


def free_host_memory(process: Path = Path("/proc/self")) -> FreeMemory:
    """The least of what the machine and the control groups of a process leave; cached files count as free.

    Args:
        process: Folder with the process's `cgroup` and `mountinfo`. What is missing or cannot be read is no limit.
    """
    least = FreeMemory(int(psutil.virtual_memory().available))
    for group in _groups(process):
        cached = _cached_bytes(group)
        for limit_name, used_name in LIMITS:
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None:
                least = min(least, FreeMemory(max(0, limit - max(0, used - cached)), limit), key=lambda free: free.size)
    return least


def _groups(process: Path) -> Iterator[Path]:
    """Folders of the groups with the process in them, each from its own up to the root that can be seen."""
    mounts = list(_mounts(process))
    for line in _lines(process / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        kind = "cgroup2" if not controllers else "memory" if "memory" in controllers.split(",") else ""
        here = [(root, folder) for found, root, folder in mounts if found == kind]
        above = [(root, folder) for root, folder in here if PurePosixPath(path).is_relative_to(root)]
        # A container may be told its host's name of the group that is the root of all it sees: the mount is the group.
        for root, folder in above or [(path, folder) for _, folder in here]:
            below = PurePosixPath(path).relative_to(root)
            yield from (folder / part for part in (below, *below.parents[: len(below.parts)]))


def _mounts(process: Path) -> Iterator[tuple[str, str, Path]]:
    """Where groups are mounted: `cgroup2` or `memory` (of version 1), the group that is the root there, and the folder.

    A line is "36 35 98:0 /root /folder options tags… - type source options"; a space in a name is "\\040".
    """
    for line in _lines(process / "mountinfo"):
        front, _, back = line.partition(" - ")
        names, (kind, _, options) = front.split(), ((*back.split(), "", "", ""))[:3]
        if kind == "cgroup":
            kind = "memory" if "memory" in options.split(",") else ""
        if kind in ("cgroup2", "memory") and len(names) > 4:
            root, folder = (_ESCAPED.sub(lambda found: chr(int(found[1], 8)), name) for name in names[3:5])
            yield kind, root, Path(folder)


def _cached_bytes(group: Path) -> int:
    entries = dict(line.split()[:2] for line in _lines(group / "memory.stat") if len(line.split()) == 2)
    for names in _FILE_CACHE:
        if names <= entries.keys():
            return sum(int(entries[name]) for name in names if entries[name].isdecimal())
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and what cannot be read."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
