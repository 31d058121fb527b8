"""A real Slurm on this machine: a controller and two nodes on loopback addresses, for tests and for trying out.

python tests/slurm/local_slurm.py start DIR     then: export SLURM_CONF=DIR/slurm.conf
python tests/slurm/local_slurm.py stop DIR

Needs root and Debian's slurm-wlm (make slurm). Nothing outside DIR is written. Nodes are named by their addresses, so
that they resolve; each has eight CPUs and four GPUs that are not there (character devices like /dev/null).
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

NODES = ("127.0.0.11", "127.0.0.12")
GPUS = 4
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """\
ClusterName=anima
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
# A requeued job waits for this and a second more; the default is two minutes.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes may claim more than this machine has.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=2
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no Slurm can be started here; empty if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: make slurm installs Debian's packages"
    return "" if os.geteuid() == 0 else "the daemons of the Slurm in these tests need root"


def search_path() -> str:
    """PATH with the folders of daemons."""
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def start(folder: Path) -> None:
    """Start the controller and the nodes with all state in `folder`, and wait until the nodes are idle.

    Raises:
        RuntimeError: they are not after 30 s; says what the daemons logged.
    """
    (folder / "log").mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    ports = _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} Port={port} CPUs=8 RealMemory=20000 Gres=gpu:{GPUS}"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, controller_port=ports[0], folder=folder, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    _make_gpus(folder / "dev")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}]\n", encoding="utf-8")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    for command in (["slurmctld"], *(["slurmd", "-N", name] for name in NODES)):
        subprocess.run(command, env=environment, check=True, timeout=30, cwd=folder)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        command = ["sinfo", "--noheader", "--partition=batch", "--Node", "--states=idle", "--format=%N"]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        if len(told.stdout.split()) == len(NODES):
            return
        time.sleep(0.1)
    logs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted((folder / "log").iterdir()))
    stop(folder)
    raise RuntimeError(f"Slurm does not come up\n{logs}")


def stop(folder: Path) -> None:
    """Cancel all jobs and end the daemons; what they logged stays in `folder`."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=environment, check=False, timeout=30)
    files = [*folder.glob("slurmd.*.pid"), folder / "slurmctld.pid"]
    for file in files:
        try:
            os.kill(int(file.read_text()), signal.SIGTERM)
        except (OSError, ValueError):
            continue
    deadline = time.monotonic() + 20
    while any(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)


def _make_gpus(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(GPUS):
        device = folder / f"nvidia{number}"
        if not device.exists():
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(f"{__doc__}")
    if reason := missing():
        sys.exit(reason)
    where = Path(sys.argv[2]).resolve()
    if sys.argv[1] == "start":
        start(where)
        print(f"export SLURM_CONF={where}/slurm.conf")
    else:
        stop(where)
