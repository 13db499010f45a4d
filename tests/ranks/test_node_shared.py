"""A data set of which every node holds one copy."""

from __future__ import annotations

import gc
import os
import pickle
import re
import threading
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from mpiddl.comm import world as worlds
from mpiddl.comm.world import World
from mpiddl.data.moving import node_shared
from mpiddl.data.moving import node_stream as relay
from mpiddl.data.moving.node_shared import NodeSharedDataset
from mpiddl.data.moving.shared_files import SharedFile, map_shared, remove_unused
from mpiddl.errors import DataError

pytestmark = [pytest.mark.host, pytest.mark.layout, pytest.mark.thorough]

LENGTH = 37
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.int64]


@pytest.fixture(params=["one node", "alternating", "pairs"])
def nodes(request, world, monkeypatch):
    """The ranks on one node, or drawn apart so that only messages join them."""
    if request.param == "one node":
        yield world
        return
    if world.num_nodes > 1:
        pytest.skip("these are real ones")
    color = world.rank % 2 if request.param == "alternating" else world.rank // 2
    monkeypatch.setattr(worlds, "_node_of", lambda comm: comm.Split(color, comm.Get_rank()))
    with World(world._comm, world.launch, world.settings, world.device) as apart:
        yield apart


@pytest.fixture
def small_pieces(monkeypatch):
    """Arrays of tests are long enough for several."""
    monkeypatch.setattr(node_shared, "PIECE_BYTES", 100)
    monkeypatch.setattr(relay, "SIGN_BYTES", 1000)


@pytest.fixture
def share(shared_tmp_path):
    """``share(...)`` makes a data set whose file is in a folder of the test."""
    made = []

    def make(*arrays, **options):
        made.append(NodeSharedDataset(*arrays, folder=shared_tmp_path, **options))
        return made[-1]

    yield make
    for dataset in made:
        dataset.close()


def tensors():
    rows = torch.arange(LENGTH * 12).view(LENGTH, 3, 4)
    return [(rows % 7).to(dtype) for dtype in DTYPES] + [torch.arange(LENGTH) * 3]


def same(dataset, expected):
    return len(dataset.arrays) == len(expected) and all(
        found.dtype == wanted.dtype and torch.equal(found, wanted)
        for found, wanted in zip(dataset.arrays, expected, strict=True)
    )


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("root", [None, 0, -1])
def test_every_rank_sees_exactly_the_data(nodes, agree, share, small_pieces, shared_tmp_path, root):
    root = nodes.size - 1 if root == -1 else root
    has_it = nodes.local_rank == 0 if root is None else nodes.rank == root
    dataset = share(*(tensors() if has_it else [None]), root=root, world=nodes)

    agree(same(dataset, tensors()), dataset.fields)
    places = [array.data_ptr() % 4096 for array in dataset.arrays]
    agree(not any(places), f"not where loads are fast: {places}")
    agree(len(dataset) == LENGTH, len(dataset))
    agree(len(files_in(shared_tmp_path)) == nodes.num_nodes, files_in(shared_tmp_path))


def test_samples_are_those_of_a_tensor_dataset(agree, world, share):
    dataset = share(*(tensors() if world.local_rank == 0 else []))
    plain = torch.utils.data.TensorDataset(*tensors())
    for index in (0, 5, -1, LENGTH - 1, slice(3, 9), [4, 4, 0], torch.tensor([1, 2])):
        pairs = list(zip(dataset[index], plain[index], strict=True))
        agree(all(torch.equal(*pair) for pair in pairs), f"{index}: {pairs}")
    for index in (LENGTH, -LENGTH - 1):
        with pytest.raises(IndexError):
            dataset[index]
    batch = torch.utils.data.default_collate([dataset[1], dataset[2]])
    agree(torch.equal(batch[-1], torch.tensor([3, 6])), batch)


def sources(folder, rank):
    """The same numbers, in arrays that are laid out in many ways."""
    wanted = numpy.arange(LENGTH * 20, dtype=numpy.int32).reshape(LENGTH, 20)
    path = folder / f"{rank}.npy"
    numpy.save(path, wanted)
    strided = numpy.zeros((LENGTH * 2, 40), numpy.int32)
    strided[::2, ::2] = wanted
    leaf = torch.tensor(wanted.astype(numpy.float64), requires_grad=True)
    frozen = wanted.copy()
    frozen.flags.writeable = False
    imaginary = torch.tensor(wanted * -1j).conj()  # marks on the memory: "conjugate", "negate"
    yield wanted, numpy.load(path, mmap_mode="r")
    yield wanted, strided[::2, ::2]
    yield wanted, numpy.asfortranarray(wanted)
    yield wanted[::-1], wanted[::-1]
    yield wanted, frozen
    yield wanted, torch.tensor(wanted).T.contiguous().T
    yield wanted, leaf
    yield wanted, imaginary.imag
    yield wanted, torch._neg_view(torch.tensor(-wanted))
    yield wanted * 1j, imaginary


@pytest.mark.parametrize("root", [None, 0])
def test_any_layout(nodes, agree, share, small_pieces, tmp_path, root):
    has_it = nodes.rank == 0 if root == 0 else nodes.local_rank == 0
    wanted, given = zip(*sources(tmp_path, nodes.rank), strict=True)
    dataset = share(*(given if has_it else []), root=root, world=nodes)
    for number, array in enumerate(dataset.arrays):
        right = numpy.array_equal(array.numpy(), wanted[number])
        agree(right, f"source {number}: {array}")


def test_rows_longer_than_a_piece(nodes, agree, share, monkeypatch):
    monkeypatch.setattr(node_shared, "PIECE_BYTES", 16)
    wanted = torch.arange(300).view(3, 100)
    dataset = share(wanted if nodes.rank == 0 else None, root=0, world=nodes)
    agree(same(dataset, [wanted]), dataset.arrays)


def test_it_is_one_file_that_can_only_be_read(agree, world, share, shared_tmp_path):
    dataset = share(*(tensors() if world.local_rank == 0 else []))
    (name,) = files_in(shared_tmp_path)
    state = (shared_tmp_path / name).stat()
    mapped = re.findall(rf"(\S+) \S+ \S+ (\d+) +\S*{name}", Path("/proc/self/maps").read_text())
    agree(mapped == [("r--s", str(state.st_ino))], mapped)
    agree(state.st_mode & 0o777 == 0o600, oct(state.st_mode))
    agree(len(dataset.arrays) == len(DTYPES) + 1)


def test_nobody_is_warned(agree, world, share):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share(*(tensors() if world.local_rank == 0 else []))
    agree(caught == [], caught)


def test_the_last_rank_that_closes_removes_the_file(agree, world, share, shared_tmp_path):
    dataset = share(*(tensors() if world.local_rank == 0 else []))
    kept, sample = dataset.arrays, dataset[3]
    for rank in range(world.size):
        agree(len(files_in(shared_tmp_path)) == 1, f"gone before rank {rank} closed it")
        if rank == world.rank:
            dataset.close()
            dataset.close()
        agree(True)
    agree(files_in(shared_tmp_path) == [], files_in(shared_tmp_path))
    agree(torch.equal(kept[-1], tensors()[-1]) and torch.equal(sample[0], tensors()[0][3]))
    for use in (lambda: dataset[0], lambda: dataset.arrays):
        with pytest.raises(DataError, match="was closed; make a new one"):
            use()


def test_what_nobody_refers_to_is_closed(agree, world, shared_tmp_path):
    dataset = NodeSharedDataset(
        torch.arange(9) if world.local_rank == 0 else None, folder=shared_tmp_path
    )
    agree(len(files_in(shared_tmp_path)) == 1)
    del dataset
    gc.collect()
    agree(files_in(shared_tmp_path) == [], files_in(shared_tmp_path))


def test_it_travels_as_a_name(agree, world, share):
    dataset = share(torch.arange(100_000) if world.local_rank == 0 else None)
    text = pickle.dumps(dataset)
    agree(len(text) < 1000, len(text))
    other = pickle.loads(text)
    agree(same(other, [torch.arange(100_000)]) and len(other) == 100_000)
    other.close()
    agree(len(pickle.loads(text)) == 100_000, "a copy that was closed took the file with it")
    dataset.close()
    agree(True)  # all have closed it
    with pytest.raises(DataError, match="keep it open on the rank"):
        pickle.loads(text)


ROWS = torch.arange(6).view(3, 2)
MISTAKES = {
    "nothing": (lambda first: [], {}, "passed no arrays; the first rank of every node must"),
    "everybody": (lambda first: [ROWS], {}, "only the first rank of every node passes them"),
    "not the root": (lambda first: [ROWS] * first, {"root": -1}, r"the root, rank \d+,"),
    "lengths": (lambda first: [ROWS, ROWS[:2]] * first, {}, r"arrays have \[3, 2\] samples"),
    "empty": (lambda first: [ROWS[:0]] * first, {}, r"shape \[0, 2\]: there are no samples"),
    "empty rows": (lambda first: [ROWS[:, :0]] * first, {}, r"shape \[3, 0\]: there are no"),
    "number": (lambda first: [torch.tensor(3)] * first, {}, r"shape \[\]: there are no samples"),
    "list": (lambda first: [[1, 2]] * first, {}, "array 0 is a list; pass numpy arrays"),
    "text": (lambda first: [numpy.array(["a"])] * first, {}, "which torch does not know"),
    "objects": (lambda first: [numpy.array([{}])] * first, {}, "dtype object, which torch"),
    "big endian": (lambda first: [numpy.zeros(3, ">i4")] * first, {}, "dtype >i4, which torch"),
    "sparse": (lambda first: [ROWS.to_sparse()] * first, {}, "tensor 0 is not a plain one"),
    "root": (lambda first: [ROWS] * first, {"root": 99}, "root 99 is no rank"),
    "folder": (lambda first: [ROWS] * first, {"folder": "/no/folder"}, "No such file"),
    "too much": (
        lambda first: [numpy.broadcast_to(numpy.zeros(1), (1 << 50,))] * first,
        {},
        r"cannot share 8192TiB in .* \(only .* left\); free some",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_error_on_every_rank(agree, world, shared_tmp_path, mistake):
    arrays, options, message = MISTAKES[mistake]
    options = {"folder": shared_tmp_path, **options}
    if options.get("root") == -1:
        options["root"] = world.size - 1
    if world.size == 1 and mistake in ("everybody", "not the root"):
        pytest.skip("is right on one rank")
    found = "nothing was raised"
    try:
        NodeSharedDataset(*arrays(world.rank == 0), **options)
    except DataError as error:
        found = str(error) if error.on_every_rank else "raised on this rank alone"
    agree(re.search(message, found), found)
    agree(files_in(shared_tmp_path) == [], files_in(shared_tmp_path))


def test_nodes_must_have_the_same(nodes, agree, shared_tmp_path):
    if nodes.num_nodes == 1:
        pytest.skip("one node")
    array = torch.zeros(4, dtype=torch.int64 if nodes.rank == 0 else torch.int32)
    arrays = [array] if nodes.local_rank == 0 else []
    with pytest.raises(DataError, match="have different arrays") as caught:
        NodeSharedDataset(*arrays, world=nodes, folder=shared_tmp_path)
    agree("'int64', [4]" in str(caught.value) and "'int32', [4]" in str(caught.value))


def test_ranks_must_name_one_root(agree, world, shared_tmp_path):
    if world.size == 1:
        pytest.skip("one rank")
    with pytest.raises(DataError, match=r"rank 0 passed root=0, rank \d+ root=None") as caught:
        NodeSharedDataset(ROWS, folder=shared_tmp_path, root=None if world.rank else 0)
    agree(caught.value.on_every_rank)


@pytest.mark.parametrize("step", ["claim", "write"])
def test_a_disk_that_fails(nodes, agree, shared_tmp_path, monkeypatch, step):
    """One rank's disk, while space is claimed or samples are written."""
    failing = nodes.layout.nodes[-1][-1 if step == "claim" else 0]
    if nodes.rank == failing:

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SharedFile, step, fail)
    arrays = tensors() if nodes.rank == 0 else []
    with pytest.raises(DataError, match="No space left on device") as caught:
        NodeSharedDataset(*arrays, world=nodes, root=0, folder=shared_tmp_path)
    agree(caught.value.on_every_rank)
    agree(files_in(shared_tmp_path) == [], files_in(shared_tmp_path))


def test_one_node_without_the_folder(nodes, agree, shared_tmp_path):
    missing = nodes.node_rank == nodes.num_nodes - 1
    folder = shared_tmp_path / "missing" if missing else shared_tmp_path
    arrays = tensors() if nodes.rank == 0 else []
    with pytest.raises(DataError, match="No such file") as caught:
        NodeSharedDataset(*arrays, world=nodes, root=0, folder=folder)
    agree(caught.value.on_every_rank)
    agree(files_in(shared_tmp_path) == [], files_in(shared_tmp_path))


# The files themselves, on each rank alone.


def test_what_killed_jobs_left_is_removed_and_nothing_else(agree, tmp_path):
    held = SharedFile.create(tmp_path, 10)
    joined = SharedFile.join(held.path)
    stale = tmp_path / "mpiddl-data-killed"
    other = tmp_path / "other-data"
    link = tmp_path / "mpiddl-data-link"
    folder = tmp_path / "mpiddl-data-folder"
    stale.touch(), other.touch(), link.symlink_to(other), folder.mkdir()
    foreign = tmp_path / "mpiddl-data-foreign"
    foreign.touch()
    expected = {held.path, other, link, folder}
    if os.geteuid() == 0:
        os.chown(foreign, 12345, 12345)
        expected.add(foreign)

    remove_unused(tmp_path)
    found = set(tmp_path.iterdir())
    held.close()
    remove_unused(tmp_path)
    still = held.path.exists()
    joined.close()

    agree(found == expected, found ^ expected)
    agree(still and not held.path.exists(), "joined by one, held by the other")
    remove_unused(tmp_path / "missing")


def test_space_is_claimed_before_it_is_used(agree, tmp_path):
    file = SharedFile.create(tmp_path, 3 << 20)
    before = file.path.stat().st_blocks * 512
    file.claim(0, 3 << 20)
    after = file.path.stat().st_blocks * 512
    file.close()
    agree(before < 1 << 20 and after >= 3 << 20, (before, after))


def test_only_the_right_file_is_opened_by_name(agree, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(100))
    link = tmp_path / "link"
    link.symlink_to(path)
    agree(len(map_shared(path, 100)) == 100)
    with pytest.raises(OSError, match="shorter"):
        map_shared(path, 101)
    with pytest.raises(OSError, match="symbolic links"):
        map_shared(link, 100)
    with pytest.raises(PermissionError, match="not a file of this user's"):
        map_shared(tmp_path, 1)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(PermissionError, match="not a file of this user's"):
            map_shared(path, 100)
    agree(True)


def test_a_new_file_is_never_taken_for_an_old_one(agree, tmp_path):
    stopping = threading.Event()

    def sweep():
        while not stopping.is_set():
            remove_unused(tmp_path)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    lost = 0
    for _ in range(300):
        file = SharedFile.create(tmp_path, 1)
        lost += not file.path.exists()
        file.close()
    stopping.set()
    sweeper.join()
    agree(lost == 0, lost)
