"""What the daemons of the lab read: slurm.conf and gres.conf."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["FOLDER", "LOGS", "MUNGE_KEY", "MUNGE_SOCKET", "SLURM_CONF", "write_configuration"]

FOLDER = Path("/run/slurm_lab")
LOGS = FOLDER / "logs"
SLURM_CONF = FOLDER / "slurm.conf"
MUNGE_KEY = FOLDER / "munge.key"
MUNGE_SOCKET = FOLDER / "munge.socket"


class _Host(Protocol):
    name: str
    address: str


GENERAL = f"""\
ClusterName=lab
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired, 2 minutes by default (5 s at least).
AuthInfo=socket={MUNGE_SOCKET},cred_expire=5
StateSaveLocation={FOLDER}/state
# One for each slurmd (%n): they run on one file system, and PMIx's sockets are in there.
SlurmdSpoolDir={FOLDER}/spool-%n
TmpFS={FOLDER}/local-%n
SlurmdPidFile={FOLDER}/slurmd-%n.pid
SlurmctldPidFile={FOLDER}/slurmctld.pid
# Without cgroups, which belong to the machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
# The nodes have what this file says, whatever slurmd finds.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
# Jobs of `urgent` take the nodes of jobs of `main`, which get their own --signal and time to
# save, and run again later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
"""


def write_configuration(nodes: Sequence[_Host], login: _Host, cpus: int, gpus: int) -> None:
    """Write all files of the cluster, and make the folders that its daemons expect."""
    lines = [GENERAL, f"SlurmctldHost={login.name}({login.address})"]
    for node in nodes:
        for kind in ("spool", "local"):
            (FOLDER / f"{kind}-{node.name}").mkdir()
        size = f"CPUs={cpus} CoresPerSocket={cpus} RealMemory=4000"
        size += f" Gres=gpu:{gpus}" if gpus else ""
        lines.append(f"NodeName={node.name} NodeAddr={node.address} {size}")
    names = ",".join(node.name for node in nodes)
    partition = f"Nodes={names} MaxTime=60 State=UP"
    lines.append(f"PartitionName=main {partition} Default=YES PriorityTier=1 GraceTime=30")
    lines.append(f"PartitionName=urgent {partition} PriorityTier=2 PreemptMode=OFF")
    (FOLDER / "state").mkdir()
    SLURM_CONF.write_text("\n".join(lines) + "\n")
    (FOLDER / "gres.conf").write_text(_gpus(gpus))


def _gpus(number: int) -> str:
    """Slurm hands out device files, and never opens them: copies of /dev/null will do."""
    files = [FOLDER / f"gpu{index}" for index in range(number)]
    for file in files:
        os.mknod(file, 0o600 | stat.S_IFCHR, Path("/dev/null").stat().st_rdev)
    return "".join(f"Name=gpu File={file}\n" for file in files)
