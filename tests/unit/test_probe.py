"""Can this MPI read GPU memory: what libraries say of themselves, and what is kept of a test."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpiddl.devices.cuda_aware import cache as probe_cache
from mpiddl.devices.cuda_aware import facts, probe, trial
from mpiddl.devices.cuda_aware.hints import Evidence, hint
from mpiddl.devices.cuda_aware.probe import staging_verdict, verdict_of
from mpiddl.devices.cuda_aware.trial import Outcome, find_launcher
from mpiddl.devices.cuda_aware.trial_rank import SIZES
from mpiddl.launch.launchers import gpu_binding, without_launcher

UCX, UCX_WITH_CUDA = {"version": "1.20.1", "cuda": False}, {"version": "1.22.0", "cuda": True}


def library(query=None, gpu=None):
    """An MPI library's queries: what they answer, None where it has none."""
    functions = {}
    if query is not None:
        functions["MPIX_Query_cuda_support"] = lambda: query

    def gpu_query(kind, flag):
        assert kind.value == 0
        flag._obj.value = gpu
        return 0

    if gpu is not None:
        functions["MPIX_GPU_query_support"] = gpu_query
    return SimpleNamespace(**functions)


OPEN_MPI, OPEN_MPI_4, MPICH = "Open MPI v5.0.11", "Open MPI v4.1.4", "MPICH 5.0.2"
INTEL, CRAY = "Intel(R) MPI Library 2021.18.1", "CRAY MPICH version 8.1.28"
MV2, MVP = "MVAPICH2 2.3.7", "MVAPICH 4.0"
GPUS_ON = {"MPICH_GPU_SUPPORT_ENABLED": "1"}


@pytest.mark.parametrize(
    ("name", "handle", "environ", "more", "answer", "words"),
    [
        (OPEN_MPI, library(query=1), {}, {}, "yes", "is 1"),
        (OPEN_MPI, library(query=1), {}, {"ucx": UCX_WITH_CUDA}, "yes", "is 1"),
        (OPEN_MPI, library(query=1), {}, {"ucx": UCX}, "unknown", "UCX, which may carry"),
        (OPEN_MPI, library(query=0), {}, {"ucx": UCX_WITH_CUDA}, "unknown", "is 0"),
        (OPEN_MPI, library(query=0), {}, {}, "unknown", "is 0"),
        (OPEN_MPI, library(), {}, {}, "unknown", "offers no query"),
        (OPEN_MPI, None, {}, {}, "unknown", "offers no query"),
        (OPEN_MPI_4, library(query=1), {}, {}, "unknown", "opal_cuda_support"),
        (OPEN_MPI_4, library(query=1), {"OMPI_MCA_opal_cuda_support": "true"}, {}, "yes", "is 1"),
        (OPEN_MPI_4, library(query=1), {"OMPI_MCA_opal_cuda_support": "0"}, {}, "unknown", "built"),
        (MPICH, library(query=1, gpu=1), {}, {}, "yes", "MPIX_GPU_query_support() is 1"),
        (MPICH, library(query=0, gpu=0), {}, {}, "no", "MPIX_GPU_query_support() is 0"),
        (MPICH, library(), {}, {}, "unknown", "offers no query"),
        (CRAY, library(gpu=1), {}, {"gtl": True}, "no", "MPICH_GPU_SUPPORT_ENABLED is not set"),
        (CRAY, None, {"MPICH_GPU_SUPPORT_ENABLED": "0"}, {"gtl": True}, "no", "ENABLED=0"),
        (CRAY, None, GPUS_ON, {"gtl": True}, "yes", "libmpi_gtl_cuda is loaded"),
        (CRAY, None, GPUS_ON, {}, "unknown", "libmpi_gtl_cuda is not loaded"),
        (INTEL, library(query=1, gpu=1), {}, {}, "no", "I_MPI_OFFLOAD is not set"),
        (INTEL, library(gpu=1), {"I_MPI_OFFLOAD": "0"}, {}, "no", "I_MPI_OFFLOAD=0"),
        (INTEL, library(gpu=1), {"I_MPI_OFFLOAD": "1"}, {}, "yes", "is 1"),
        (INTEL, library(gpu=0), {"I_MPI_OFFLOAD": "1"}, {}, "unknown", "I_MPI_OFFLOAD=1"),
        (MV2, library(query=1), {}, {}, "no", "MV2_USE_CUDA is not set"),
        (MV2, library(query=1), {"MV2_USE_CUDA": "1"}, {}, "unknown", "is 1"),
        (MV2, library(query=0), {"MV2_USE_CUDA": "1"}, {}, "no", "is 0"),
        (MVP, library(gpu=1), {}, {}, "unknown", "MVP_USE_CUDA is not set"),
        (MVP, library(gpu=1), {"MVP_USE_CUDA": "1"}, {}, "yes", "is 1"),
        (MVP, library(gpu=1), {"MVP_USE_CUDA": "0"}, {}, "no", "MVP_USE_CUDA=0"),
        (MVP, library(gpu=0), {}, {}, "no", "is 0"),
        ("Fujitsu MPI", None, {}, {}, "unknown", "Fujitsu MPI offers no query"),
    ],
)
def test_hints(name, handle, environ, more, answer, words):
    verdict = hint(Evidence(name, handle, environ, **more))
    assert verdict.answer == answer, verdict
    assert words in verdict.reason


def test_the_user_has_the_last_word():
    assert staging_verdict("device", MPICH, None, 0) == ("yes", "MPIDDL_STAGING=device")
    assert staging_verdict("host", MPICH, None, 0) == ("no", "MPIDDL_STAGING=host")


@pytest.mark.parametrize(
    ("outcome", "seconds"),
    [
        (Outcome(2, True, SIZES[-1], None), None),
        (Outcome(2, True, 0, "exit status 139 (SIGSEGV)"), None),
        (Outcome(2, True, 1, "no answer after 60 s", True), probe.DOUBT_SECONDS),
        (Outcome(2, False, 0, "no answer after 60 s", True), probe.DOUBT_SECONDS),
        (Outcome(1, False, 0, "ImportError: no CuPy"), probe.RETRY_SECONDS),
    ],
)
def test_for_how_long_an_answer_counts(tmp_path, monkeypatch, outcome, seconds):
    monkeypatch.setattr(facts, "driver_version", lambda: "580.1")
    monkeypatch.setattr(probe, "run_test", lambda *_: outcome)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    hint_only = staging_verdict("auto", "an MPI", None, 0, environ, test=False)
    assert hint_only == ("unknown", "an MPI offers no query")
    verdict = staging_verdict("auto", "an MPI", None, 0, environ)

    assert verdict == verdict_of(outcome)
    (file,) = (tmp_path / "mpiddl" / "gpu").iterdir()
    (entry,) = json.loads(file.read_text())["found"].values()
    left = None if entry["expires"] is None else entry["expires"] - time.time()
    assert left is None if seconds is None else seconds - 60 < left <= seconds
    monkeypatch.setattr(probe, "run_test", None)  # it is not asked again
    again = staging_verdict("auto", "an MPI", None, 0, environ, test=False)
    assert (again.answer, again.reason.startswith(verdict.reason)) == (verdict.answer, True)


def test_without_a_driver_nothing_is_asked_or_tried(monkeypatch):
    monkeypatch.setattr(facts, "driver_version", lambda: None)
    monkeypatch.setattr(facts, "driver_cuda", lambda: None)
    assert staging_verdict("auto", OPEN_MPI, "/nowhere", 0) == (
        "no",
        "no NVIDIA driver on this node",
    )


@pytest.mark.parametrize(
    ("outcome", "answer", "words"),
    [
        (Outcome(2, True, SIZES[-1], None), "yes", "up to 64MiB arrived between two ranks"),
        (Outcome(1, True, SIZES[-1], None), "yes", "from a rank to itself"),
        (Outcome(2, True, 4096, "exit status 139 (SIGSEGV)"), "no", "up to 4KiB arrived"),
        (Outcome(2, True, 4096, "exit status 139 (SIGSEGV)"), "no", "SIGSEGV"),
        (Outcome(2, True, 0, "killed by SIGBUS"), "no", "none arrived, then: killed by SIGBUS"),
        (Outcome(2, True, 1, "no answer after 60 s", True), "no", "no answer"),
        (Outcome(2, False, 0, "no answer after 60 s", True), "unknown", "could not start"),
        (Outcome(1, False, 0, "ImportError: no CuPy"), "unknown", "no CuPy"),
    ],
)
def test_what_a_test_means(outcome, answer, words):
    verdict = verdict_of(outcome)
    assert verdict.answer == answer
    assert words in verdict.reason


# What is kept.

KEY = probe_cache.fingerprint({"library": MPICH})


def test_an_answer_is_kept_until_what_it_depends_on_changes(tmp_path):
    file = tmp_path / "gpu" / "node.json"
    probe_cache.remember(file, KEY, "no", "tested: SIGSEGV", MPICH, None)
    probe_cache.remember(file, "another", "yes", "tested", MPICH, None)

    assert probe_cache.recall(file, KEY) == ("no", "tested: SIGSEGV")
    assert probe_cache.recall(file, "another") == ("yes", "tested")
    assert probe_cache.recall(file, probe_cache.fingerprint({"library": OPEN_MPI})) is None
    probe_cache.remember(file, KEY, "yes", "tested again", MPICH, None)
    assert probe_cache.recall(file, KEY) == ("yes", "tested again")
    assert [path.name for path in file.parent.iterdir()] == ["node.json"]


def test_doubts_are_kept_for_a_while(tmp_path):
    file = tmp_path / "node.json"
    probe_cache.remember(file, KEY, "no", "no answer after 60 s", MPICH, 1000.0)
    assert probe_cache.recall(file, KEY) == ("no", "no answer after 60 s")
    table = json.loads(file.read_text())
    table["found"][KEY]["expires"] = time.time() - 1
    file.write_text(json.dumps(table))
    assert probe_cache.recall(file, KEY) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\x80", '{"mpiddl_probe": 2, "found": {}}', '{"mpiddl_probe": 1}']
    + [json.dumps({"mpiddl_probe": 1, "found": found}) for found in ([], {KEY: 1}, {KEY: {}})],
)
def test_a_broken_file_is_no_file(tmp_path, text):
    file = tmp_path / "node.json"
    file.write_text(text, encoding="latin-1")
    assert probe_cache.recall(file, KEY) is None
    probe_cache.remember(file, KEY, "yes", "tested", MPICH, None)
    assert probe_cache.recall(file, KEY) == ("yes", "tested")


def test_a_file_that_cannot_be_written_is_ignored(tmp_path):
    (tmp_path / "occupied").write_text("a file")
    file = tmp_path / "occupied" / "gpu" / "node.json"
    probe_cache.remember(file, KEY, "yes", "tested", MPICH, None)
    assert probe_cache.recall(file, KEY) is None


def test_a_file_does_not_grow_for_ever(tmp_path):
    file = tmp_path / "node.json"
    for number in range(probe_cache.KEPT + 3):
        probe_cache.remember(file, str(number), "yes", "tested", MPICH, None)
    found = json.loads(file.read_text())["found"]
    assert len(found) == probe_cache.KEPT
    assert list(found)[-1] == str(probe_cache.KEPT + 2)
    assert "2" not in found


def test_where_the_file_is(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert probe_cache.cache_file("a.b-1", environ) == tmp_path / "mpiddl" / "gpu" / "a.b-1.json"
    assert probe_cache.cache_file("../x", environ).parent == tmp_path / "mpiddl" / "gpu"


def test_an_answer_depends_on_the_mpis_settings_and_not_on_the_launcher():
    settings = {"UCX_TLS": "rc,cuda", "OMPI_MCA_pml": "ucx", "I_MPI_OFFLOAD": "1"}
    told = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_orte_hnp_uri": "x",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "I_MPI_HYDRA_UUID": "7",
        "SLURM_JOB_ID": "3",
        "HOME": "/home/me",
    }
    assert probe_cache.settings_of({**settings, **told}) == settings
    twice = probe_cache.settings_of({"LD_LIBRARY_PATH": "/a:/b:/a"})
    assert twice == {"LD_LIBRARY_PATH": "/a:/b"}


def test_a_fingerprint_tells_all_parts_apart(tmp_path, monkeypatch):
    file = tmp_path / "libmpi.so"
    file.write_text("old")

    def key(name=MPICH, **environ):
        return probe_cache.fingerprint(probe._circumstances(name, str(file), environ))

    keys = [key(), key(OPEN_MPI), key(UCX_TLS="rc"), key(UCX_TLS="rc,cuda")]
    file.write_text("newer")
    keys.append(key())
    monkeypatch.setattr(facts, "driver_version", lambda: "580.1")
    keys.append(key())
    monkeypatch.setattr(facts, "cupy_version", lambda: "cupy-cuda13x 14.2.0")
    keys.append(key())
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    assert key() == keys[-1]


# Launchers.


OF_THE_JOB = """
    OMPI_COMM_WORLD_RANK OMPI_UNIVERSE_SIZE OMPI_MCA_orte_jobid OMPI_MCA_ess OMPI_VERSION
    OMPI_MCA_rmaps_base_mapping_policy OMPI_MCA_initial_wdir PRTE_LAUNCHED PMIX_RANK
    PMIX_NAMESPACE PMIX_SERVER_URI41 PMI_RANK PMI_FD PMI2_RANK HYDI_CONTROL_FD HYDRA_HOST_FILE
    I_MPI_HYDRA_BOOTSTRAP I_MPI_PMI_LIBRARY MPI_LOCALRANKID MPIEXEC_TIMEOUT SLURM_PROCID
    SLURM_JOB_ID SLURMD_NODENAME PALS_RANKID FLUX_URI PBS_NODEFILE LSB_HOSTS
    MV2_COMM_WORLD_RANK MVP_COMM_WORLD_RANK PE_HOSTFILE
"""


def test_what_launchers_add_is_left_out():
    own = {
        "PATH": "/bin",
        "OMPI_MCA_pml": "ucx",
        "OMPI_MCA_btl": "^smcuda",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OPAL_PREFIX": "/opt/openmpi",
        "PRTE_MCA_prte_if_include": "eth0",
        "UCX_TLS": "rc,cuda",
        "I_MPI_FABRICS": "shm",
        "I_MPI_OFFLOAD": "1",
        "MV2_USE_CUDA": "1",
        "MPICH_GPU_SUPPORT_ENABLED": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    assert without_launcher({**own, **dict.fromkeys(OF_THE_JOB.split(), "1")}) == own


@pytest.mark.parametrize(
    ("environ", "option"),
    [
        ({}, None),
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task=1"),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"}, None),
        ({"SLURM_GPU_BIND": "closest"}, "--gpu-bind=closest"),
    ],
)
def test_gpu_binding(environ, option):
    assert gpu_binding(environ) == option


BANNERS = {
    OPEN_MPI: "mpirun (Open MPI) 5.0.11",
    MPICH: "HYDRA build details:",
    INTEL: "Intel(R) MPI Library for Linux* OS, Version 2021.18",
}


@pytest.fixture
def launcher(tmp_path):
    """``launcher("a/bin/mpirun", banner)`` makes a program that prints the banner."""

    def make(name, banner):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho '{banner}'\n")
        program.chmod(0o755)
        return str(program)

    return make


def test_the_launcher_beside_the_library_is_taken(launcher, tmp_path):
    on_the_path = launcher("bin/mpirun", BANNERS[OPEN_MPI])
    beside = launcher("openmpi/bin/mpirun", BANNERS[OPEN_MPI])
    environ = {"PATH": f"/nowhere:{tmp_path}/bin"}

    found = find_launcher(OPEN_MPI, f"{tmp_path}/openmpi/lib/libmpi.so.40", environ)
    assert found[:3] == [beside, "-n", "2"]
    assert ("--allow-run-as-root" in found) == (os.geteuid() == 0)
    assert find_launcher(OPEN_MPI, None, environ)[0] == on_the_path
    assert find_launcher(OPEN_MPI, "/elsewhere/libmpi.so", environ)[0] == on_the_path


def test_a_launcher_that_others_may_have_put_there_is_not_taken(launcher, tmp_path):
    """In the ``bin`` of a folder far above the library, in which everybody may make one."""
    program = Path(launcher("scratch/bin/mpirun", BANNERS[OPEN_MPI]))
    library = tmp_path / "scratch/me/openmpi/lib/libmpi.so.40"

    def found():
        return find_launcher(OPEN_MPI, str(library), {"PATH": "/nowhere"})

    assert found()[0] == str(program)
    for path in (program.parent, program):
        path.chmod(0o777)
        assert found() is None
        path.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
            assert found() is None
            os.chown(path, 0, 0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    program.rename(elsewhere / "mpirun")
    program.symlink_to(elsewhere / "mpirun")
    assert found() is None
    elsewhere.chmod(0o755)
    assert found()[0] == str(program)


def test_a_launcher_of_another_family_is_not_taken(launcher, tmp_path):
    environ = {"PATH": f"{tmp_path}/bin"}
    launcher("bin/mpiexec", BANNERS[OPEN_MPI])
    launcher("bin/mpirun", BANNERS[MPICH])
    assert [find_launcher(name, None, environ) for name in (MPICH, OPEN_MPI, CRAY)] == [None] * 3

    hydra = launcher("bin/mpiexec.hydra", BANNERS[MPICH])
    assert find_launcher(MPICH, None, environ) == [hydra, "-launcher", "fork", "-n", "2"]
    assert find_launcher(MV2, None, environ)[0] == hydra
    assert find_launcher(INTEL, None, environ) is None
    assert find_launcher(CRAY, None, environ) is None
    assert find_launcher("Fujitsu MPI", None, environ) is None
    launcher("bin/mpiexec.hydra", BANNERS[INTEL])
    assert find_launcher(INTEL, None, environ)[0] == hydra


@pytest.mark.parametrize(
    ("code", "output", "text"),
    [
        (-11, "", "killed by SIGSEGV"),
        (139, "exited on\nsignal 11 (Segmentation fault)", "exit status 139 (SIGSEGV)"),
        (11, "EXIT STRING: Segmentation fault (signal 11)", "exit status 11 (SIGSEGV)"),
        (
            255,
            "KILLED BY SIGNAL: 9 (Killed)\nKILLED BY SIGNAL: 11 (Segmentation fault)",
            "exit status 255 (SIGSEGV)",
        ),
        (137, "signal 9", "exit status 137 (SIGKILL)"),
        (1, "", "exit status 1"),
        (0, "", "exit status 0"),
    ],
)
def test_how_a_job_ended(code, output, text):
    assert trial._described(code, output) == text


# Facts.


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n",
            "580.159.04",
        ),
        ("something else\n", "something else"),
    ],
)
def test_the_drivers_version(tmp_path, monkeypatch, text, version):
    monkeypatch.setattr(facts, "_DRIVER", tmp_path / "version")
    assert facts.driver_version() is None
    (tmp_path / "version").write_text(text)
    assert facts.driver_version() == version


def test_versions_that_are_numbers():
    assert [facts._cuda_version(n) for n in (13020, 12040, 11080)] == ["13.2", "12.4", "11.8"]
    assert [facts._nccl_version(n) for n in (22703, 2804)] == ["2.27.3", "2.8.4"]


def test_libraries_of_this_process():
    assert facts.mapped_file("libc")
    assert facts.mapped_file("libnothing") is None
    assert set(facts.cupy_facts()) == {"version", "cuda", "nccl", "problem"}
