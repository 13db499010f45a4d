"""The rules of the house, so that they hold without anybody watching."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpiddl
from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.collectives.choose import ALGORITHMS

TOP = Path(__file__).parents[2]
SOURCE = TOP / "src" / "mpiddl"
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(SOURCE)], "mpiddl.")
    if not info.name.endswith("__main__")
)
FILES = sorted(SOURCE.rglob("*.py"))


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=TOP
    )


def test_layers():
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=TOP,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_all_lists_what_is_public():
    """``__all__`` names everything public that a module defines, and nothing else."""
    for name in MODULES:
        module = importlib.import_module(name)
        tree = ast.parse(Path(module.__file__).read_text())
        defined = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        public = set(getattr(module, "__all__", []))
        assert defined <= public, (name, defined - public)
        for each in public:
            assert hasattr(module, each), (name, each)


def test_public_names_exist_and_are_documented():
    assert sorted(mpiddl.__all__) == sorted(mpiddl._HOMES)
    for name in mpiddl.__all__:
        assert getattr(mpiddl, name).__doc__, name
    assert set(mpiddl.__all__) <= set(dir(mpiddl))
    with pytest.raises(AttributeError, match="nothing"):
        mpiddl.nothing  # noqa: B018


def test_importing_starts_nothing():
    code = """
import sys, threading, mpiddl
assert not {"mpi4py.MPI", "torch", "numpy"} & set(sys.modules), "import mpiddl loads too much"
import pkgutil, importlib
for info in pkgutil.walk_packages(mpiddl.__path__, "mpiddl."):
    if not info.name.endswith("__main__"):
        importlib.import_module(info.name)
assert "mpi4py.MPI" not in sys.modules, "a module starts MPI"
assert threading.active_count() == 1, "a module starts a thread"
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"environ\b.*MPIDDL_", {"settings.py"}),
        (r"\bpickle\b|\btorch\.load\b", set()),
        # mpi4py's lower-case methods pickle
        (r"comm\.(send|recv|bcast|gather|scatter|allgather|allreduce)\(", set()),
        (r"shell=True|os\.system|\beval\(|\bexec\(", set()),
        (r"(OMPI_COMM_WORLD|PMI_RANK|SLURM_PROCID)", {"launchers.py"}),
        # One stream may be waited for, never all that is on a GPU.
        (r"[dD]eviceSynchronize|cuda\.synchronize|Device\([^)]*\)\.synchronize", set()),
        (
            r"^\s*(import|from) cupy",
            {"driver.py", "kernels.py", "nccl.py", "registry.py", "facts.py", "trial_rank.py"},
        ),
        (r"\b(TODO|FIXME|XXX)\b", set()),
    ],
)
def test_some_things_are_done_in_one_place_or_nowhere(pattern, allowed):
    found = {
        path.name: match.group()
        for path in FILES
        if path.name not in allowed and (match := re.search(pattern, code_of(path), re.MULTILINE))
    }
    assert found == {}


def code_of(path):
    """Source without docstrings and comments."""
    return re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (TOP / name).read_text(), flags=re.DOTALL)


# Each block is a program of its own; one job runs them all: starting ranks is what takes time.
IN_TURN = """
import runpy, sys
if __name__ == "__main__":
    for script in sys.argv[1:]:
        print("now", script, flush=True)
        runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/checkpoints.md"])
def test_code_of_pages_runs_on_two_ranks(tmp_path, page):
    scripts = []
    for number, block in enumerate(python_blocks(page)):
        scripts.append(tmp_path / f"page_{number}.py")
        scripts[-1].write_text(block)
    assert scripts
    (tmp_path / "in_turn.py").write_text(IN_TURN)
    job = subprocess.run(
        [TOP / "tools" / "mpirun", "-n", "2", "python", tmp_path / "in_turn.py", *scripts],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=tmp_path if "checkpoints" in page else TOP,  # one writes, others read
    )
    assert job.returncode == 0, job.stdout + job.stderr


def test_links_between_documents_lead_somewhere():
    for path in [TOP / "README.md", TOP / "CONTRIBUTING.md", *(TOP / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_settings_name_every_algorithm():
    assert set(ALGORITHM_NAMES) == {"auto", *ALGORITHMS}


def test_version_is_in_the_changelog():
    assert f"## [{mpiddl.__version__}]" in (TOP / "CHANGELOG.md").read_text()


def test_scripts_leave_standard_input_to_the_shell():
    """A launcher reads all of it, and a loop around the script would run once."""
    for script in (*(TOP / "jobs/mpirun").glob("*.sh"), TOP / "jobs/slurm/mpirun_in_sbatch.sbatch"):
        assert 'python "$@" </dev/null' in script.read_text(), script
