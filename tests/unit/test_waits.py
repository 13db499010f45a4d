"""Generators of waits, run without any rank."""

from __future__ import annotations

import pickle

import pytest

from mpiddl import errors
from mpiddl.base.waits import ALREADY, AllOf, Queue
from mpiddl.doctor.traps import find_traps


class After:
    """Done at the n-th question."""

    def __init__(self, questions):
        self.left = questions

    def done(self):
        self.left -= 1
        return self.left <= 0


def test_all_of_asks_until_each_is_done():
    waits = AllOf([After(1), After(3), ALREADY])
    assert [waits.done() for _ in range(4)] == [False, False, True, True]
    assert AllOf([]).done()


@pytest.mark.parametrize(
    "error",
    [
        errors.NoMpiError("why"),
        errors.SingletonError("srun", 4, "Open MPI v5", "Do this."),
        errors.MismatchError("text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def mpi(library="Open MPI v5", thread_level="MPI_THREAD_MULTIPLE", tcp_eager_bytes=None):
    return {
        "library": library,
        "thread_level": thread_level,
        "tcp_eager_bytes": tcp_eager_bytes,
    }


def facts(rank=0, size=1, hostname="a", **changes):
    return {
        "hostname": hostname,
        "cores": [0, 1, 2, 3],
        "node_cores": 4,
        "omp_num_threads": "1",
        "start_method": "forkserver",
        "shared_memory_bytes": 1 << 33,
        "interfaces": [],
        "versions": {"torch": "2"},
        "mpi": mpi(),
        "gpu": {
            "driver": None,
            "driver_cuda": None,
            "torch_cuda": None,
            "devices": [],
            "device": None,
            "visible": None,
        },
        "place": {"local_size": size, "own_cores": 1, "chunk_bytes": 512 << 10},
        **changes,
    }


DOCKER = [{"name": "docker0", "address": "172.17.0.1", "mbit_per_second": 0}]


@pytest.mark.parametrize(
    ("ranks", "severity", "words"),
    [
        ([facts(), facts(versions={"torch": "3"})], "error", "versions of torch"),
        ([facts(), facts(mpi=mpi("MPICH"))], "error", "different MPIs"),
        ([facts(cores=[0])] * 2, "warning", "share 1 cores"),
        ([facts(cores=[0, 1])] * 2, "warning", "bound to the same 2 of 4"),
        ([facts(cores=[0]), facts(cores=[1])], "warning", "bound to one core"),
        ([facts(size=2, omp_num_threads=None)] * 2, "note", "OMP_NUM_THREADS is unset"),
        ([facts(start_method="fork")], "note", "forked"),
        ([facts(mpi=mpi(thread_level="MPI_THREAD_FUNNELED"))], "note", "inline"),
        ([facts(shared_memory_bytes=64 << 20)], "warning", "64MiB of shared memory"),
        ([facts(interfaces=DOCKER), facts(hostname="b")], "warning", "docker0"),
        (
            [facts(mpi=mpi(tcp_eager_bytes="65536")), facts(hostname="b")],
            "note",
            "less than a chunk (512KiB)",
        ),
    ],
)
def test_traps_are_found(ranks, severity, words):
    found = [trap for trap in find_traps(ranks) if words in trap.what]
    assert [trap.severity for trap in found] == [severity]
    assert found[0].fix


def test_no_trap_where_all_is_well():
    assert find_traps([facts(0, 2, cores=[0, 1]), facts(1, 2, cores=[2, 3])]) == []
    assert find_traps([facts(mpi=None, place=None)]) == []
    large = mpi(tcp_eager_bytes="1000000")
    assert find_traps([facts(mpi=large), facts(mpi=large, hostname="b")]) == []
    assert find_traps([facts(mpi=mpi(tcp_eager_bytes="1"))]) == []  # one node


def test_tickets_are_served_in_their_order():
    queue = Queue()
    first, second, third = (queue.ticket() for _ in range(3))
    assert [wait.done() for wait in (first, second, third)] == [True, False, False]
    queue.leave()
    assert [wait.done() for wait in (second, third)] == [True, False]
    queue.leave()
    assert third.done()
