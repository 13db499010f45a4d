"""What can be said of the scripts without a Slurm; those for mpirun, as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from batch import SCRIPTS, TOP, environment

MPIRUN_SCRIPTS = TOP / "jobs" / "mpirun"
SBATCH = sorted(SCRIPTS.glob("*.sbatch"))
ALL = [*SBATCH, *sorted(MPIRUN_SCRIPTS.glob("*.sh"))]
AGENT = TOP / "benchmarks" / "lab" / "agent.py"


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_a_script_is_bash_and_says_what_it_needs(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    text = script.read_text()

    assert text.startswith("#!/bin/bash\n# ")
    assert "\n# Needs: " in text
    assert "\nset -euo pipefail\n" in text
    assert f"jobs/{script.parent.name}/{script.name}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
def test_numbers_of_a_job_are_where_slurm_reads_them(script):
    """It ignores directives after the first command."""
    head, commands = script.read_text().split("set -euo pipefail")

    assert "#SBATCH" not in commands
    for name in ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"):
        assert re.search(rf"^#SBATCH --{name}=", head, re.M), name
    for launch in re.findall(r"^srun .*", commands, re.M):
        assert "--mpi=" in launch
        assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in launch


def test_docs_name_every_script():
    page = (TOP / "docs" / "slurm.md").read_text()

    assert [path.name for path in ALL if path.name not in page] == []


def start(script, *arguments, **variables):
    return subprocess.run(
        [MPIRUN_SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment() | variables,
        cwd=TOP,
        check=False,
    )


@pytest.mark.parametrize("script", ["single_node.sh", "mpich.sh", "intel.sh"])
def test_mpirun_on_one_node(slurm, program, script):
    job = start(script, program, "two words", RANKS="2")

    assert job.returncode == 0, job.stderr
    assert sorted(re.findall(r"^rank \d of 2", job.stdout, re.M)) == ["rank 0 of 2", "rank 1 of 2"]
    assert "arguments ['two words']" in job.stdout


HOSTFILES = {
    "hostfile.sh": "host1 slots=1\nhost2 slots=1\n",
    "mpich.sh": "host1:1\nhost2:1\n",
    "intel.sh": "host1:1\nhost2:1\n",
}


@pytest.mark.parametrize("script", HOSTFILES)
def test_mpirun_on_two_hosts(slurm, program, tmp_path, script):
    """The agent of benchmarks/lab stands in for ssh."""
    assert {"host1", "host2"} < set(json.loads(os.environ["LAB_HOSTS"]))
    (tmp_path / "hosts").write_text(HOSTFILES[script])
    instead_of_ssh = {
        "PRTE_MCA_plm_ssh_agent": str(AGENT),
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        "HYDRA_LAUNCHER_EXEC": str(AGENT),
        "I_MPI_HYDRA_BOOTSTRAP_EXEC": str(AGENT),
    }
    job = start(script, program, HOSTFILE=str(tmp_path / "hosts"), **instead_of_ssh)

    assert job.returncode == 0, job.stderr
    hosts = re.findall(r"^rank \d of 2 on (\S+)", job.stdout, re.M)
    assert sorted(hosts) == ["host1", "host2"], job.stdout


@pytest.mark.parametrize("script", ["mpich.sh", "intel.sh"])
def test_no_such_mpi(program, script):
    job = start(script, program, MPIEXEC="/nowhere")

    assert job.returncode == 2
    assert "no /nowhere; run `make install MPI=" in job.stderr


def test_no_hostfile(program):
    job = start("hostfile.sh", program, HOSTFILE="/nowhere")

    assert job.returncode == 2
    assert job.stderr == (
        "no hostfile /nowhere; write lines such as: node1 slots=4; or set HOSTFILE\n"
    )
