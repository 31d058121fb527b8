"""Free host memory under control groups: made-up trees with numbers that one can add up, and the real machine."""

from pathlib import Path

import psutil
import pytest

from anima.free_memory import FreeMemory, free_host_memory

GIB = 2**30
UNLIMITED = 9223372036854771712  # what version 1 says for no limit


@pytest.fixture(autouse=True)
def free_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


class Machine:
    """A process and the groups that it sees, all below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, folder / "proc"
        self.process.mkdir()

    def belongs(self, *lines: str) -> None:
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mounts(self, *mounts: tuple[str, str, str]) -> None:
        """(root, folder, what stands behind the dash)."""
        lines = [
            f"31 23 0:28 {root} {str(self.folder / folder).replace(' ', chr(92) + '040')} rw shared:9 - {kind}"
            for root, folder, kind in mounts
        ]
        (self.process / "mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines, ""]))

    def group(self, folder: str, **files: object) -> None:
        (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.folder / folder / f"memory.{name}").write_text(f"{content}\n")

    def free(self) -> FreeMemory:
        return free_host_memory(self.process)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


V2 = "cgroup2 cgroup2 rw,nsdelegate"
V1 = "cgroup cgroup rw,memory"


def test_without_groups_it_is_what_the_machine_has(machine: Machine) -> None:
    assert machine.free() == FreeMemory(100 * GIB)  # neither file is there
    machine.belongs("0::/", "a line of nothing")
    machine.mounts(("/", "cg", V2))
    assert machine.free() == FreeMemory(100 * GIB)  # the root of version 2 has no files
    assert str(machine.free()) == "100.0 GiB free"


def test_slurm_version_2_the_job_decides_over_its_step(machine: Machine) -> None:
    machine.belongs("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    machine.mounts(("/", "cg", V2))
    job = "cg/system.slice/slurmstepd.scope/job_7"
    cached = f"anon {9 * GIB}\nfile {12 * GIB}\ninactive_file {7 * GIB}\nactive_file {4 * GIB}\nslab_reclaimable 5"
    # 64 allowed, 21 used, of which 7 + 4 are cached files: 64 - (21 - 11) = 54.
    machine.group(job, max=64 * GIB, high="max", current=21 * GIB, stat=cached)
    machine.group(f"{job}/step_0", max="max", current=20 * GIB, stat="anon 5")
    machine.group(f"{job}/step_0/user/task_0", max=80 * GIB, current=20 * GIB)  # leaves 60, with no memory.stat
    machine.group("cg/system.slice", max="max", current=90 * GIB)
    assert machine.free() == FreeMemory(54 * GIB, 64 * GIB)
    assert str(machine.free()) == "54.0 GiB free of the 64.0 GiB that this job may use"
    machine.group(job, high=50 * GIB)  # 50 - 10
    assert machine.free() == FreeMemory(40 * GIB, 50 * GIB)
    machine.group("cg/system.slice", max=95 * GIB)  # 95 - 90: the parent of all
    assert machine.free() == FreeMemory(5 * GIB, 95 * GIB)


def test_the_machine_itself_can_have_less(machine: Machine) -> None:
    machine.belongs("0::/job")
    machine.mounts(("/", "cg", V2))
    machine.group("cg/job", max=200 * GIB, current=GIB)
    assert machine.free() == FreeMemory(100 * GIB)


def test_more_used_than_allowed_leaves_nothing(machine: Machine) -> None:
    machine.belongs("0::/job")
    machine.mounts(("/", "cg", V2))
    machine.group("cg/job", max=2 * GIB, current=3 * GIB)
    assert machine.free() == FreeMemory(0, 2 * GIB)
    machine.group("cg/job", stat=f"inactive_file {2 * GIB}\nactive_file {2 * GIB}")  # more than is used: read later
    assert machine.free() == FreeMemory(2 * GIB, 2 * GIB)


def test_version_1_beside_an_empty_version_2(machine: Machine) -> None:
    machine.belongs("9:name=systemd:/x", "5:cpuset:/y", "4:cpu,memory:/slurm/uid_0/job_7", "0::/")
    machine.mounts(("/", "cg/cpuset", "cgroup cgroup rw,cpuset"), ("/", "cg/a memory", V1), ("/", "cg/unified", V2))
    machine.group("cg/cpuset/y", limit_in_bytes=GIB, usage_in_bytes=0)  # not of the memory
    machine.group("cg/a memory", limit_in_bytes=UNLIMITED, usage_in_bytes=300 * GIB)
    machine.group("cg/a memory/slurm/uid_0", limit_in_bytes=UNLIMITED, usage_in_bytes=40 * GIB)
    # 48 - (40 - 6 - 2); its own inactive_file is without the groups below and does not count
    stat = f"inactive_file 77\nactive_file 78\ntotal_inactive_file {6 * GIB}\ntotal_active_file {2 * GIB}"
    job = {"limit_in_bytes": 48 * GIB, "usage_in_bytes": 40 * GIB, "stat": stat}
    machine.group("cg/a memory/slurm/uid_0/job_7", **job)
    assert machine.free() == FreeMemory(16 * GIB, 48 * GIB)
    swap = {"memsw.limit_in_bytes": 48 * GIB, "memsw.usage_in_bytes": 43 * GIB}  # 3 of it swapped out
    machine.group("cg/a memory/slurm/uid_0/job_7", **swap)
    assert machine.free() == FreeMemory(13 * GIB, 48 * GIB)


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/", "/", ""),  # a namespace of its own
        ("/docker/c0ffee", "/docker/c0ffee", ""),  # without: the host's names on both sides
        ("/docker/c0ffee/init", "/docker/c0ffee", "/init"),
        ("/docker/c0ffee", "/elsewhere", ""),  # the mount is all that there is
        ("/../../c0ffee", "/", ""),  # outside of the namespace
    ],
)
@pytest.mark.parametrize(
    ("line", "kind", "names"),
    [("0::{}", V2, ("max", "current")), ("3:memory:{}", V1, ("limit_in_bytes", "usage_in_bytes"))],
)
def test_in_a_container(
    machine: Machine, path: str, root: str, below: str, line: str, kind: str, names: tuple[str, str]
) -> None:
    machine.belongs(line.format(path))
    machine.mounts((root, "cg/here", kind))
    machine.group(f"cg/here{below}", **dict(zip(names, (32 * GIB, 2 * GIB), strict=True)))
    assert machine.free() == FreeMemory(30 * GIB, 32 * GIB)


def test_what_cannot_be_read_is_no_limit(machine: Machine) -> None:
    machine.belongs("0::/job")
    machine.mounts(("/", "cg", V2))
    machine.group("cg/job", max="a lot", current="")
    assert machine.free() == FreeMemory(100 * GIB)
    machine.group("cg/job", max=GIB, current=0)
    (machine.folder / "cg/job/memory.max").unlink()
    (machine.folder / "cg/job/memory.max").mkdir()  # as root, even a file without permissions can be read
    assert machine.free() == FreeMemory(100 * GIB)
    (machine.process / "mountinfo").write_bytes(b"\xff\xfe - cgroup2\n31 23 - \n\n")
    assert machine.free() == FreeMemory(100 * GIB)


def test_this_machine() -> None:
    """Whatever it is, and whatever holds us: some memory, no more than there is."""
    assert 0 < free_host_memory().size <= psutil.virtual_memory().available
