"""One rank's file on the disks of all nodes, and the progress of long work."""

from __future__ import annotations

import io
import os
import pty
import re
import resource
import signal
import sys
import threading
from contextlib import contextmanager

import numpy
import psutil
import pytest

import mpiddl
from mpiddl.comm import world as worlds
from mpiddl.comm.world import World
from mpiddl.data.moving import file_broadcast as files
from mpiddl.data.moving import node_stream as relay
from mpiddl.data.moving import progress_bar
from mpiddl.data.moving.file_broadcast import broadcast_file
from mpiddl.data.moving.node_stream import Relay
from mpiddl.data.moving.progress_bar import progress
from mpiddl.errors import DataError

pytestmark = [pytest.mark.host, pytest.mark.layout, pytest.mark.thorough]

PIECE = 1000


@pytest.fixture(params=["one node", "alternating", "alone"])
def nodes(request, world, monkeypatch):
    """The ranks on one node, on two, or each on its own."""
    monkeypatch.setattr(files, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(relay, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(relay, "SIGN_BYTES", 2 * PIECE)
    if request.param == "one node":
        yield world
        return
    if world.num_nodes > 1:
        pytest.skip("these are real ones")
    color = world.rank % 2 if request.param == "alternating" else world.rank
    monkeypatch.setattr(worlds, "_node_of", lambda comm: comm.Split(color, comm.Get_rank()))
    with World(world._comm, world.launch, world.settings, world.device) as apart:
        yield apart


@pytest.fixture
def disk(nodes, shared_tmp_path):
    """A folder for each node, which stands for its disk."""
    folder = shared_tmp_path / f"node{nodes.node_rank}"
    folder.mkdir(exist_ok=True)
    return folder


def content(nbytes):
    return numpy.random.default_rng(nbytes).bytes(nbytes)


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def is_first(nodes):
    return nodes.local_rank == 0


@pytest.mark.parametrize("nbytes", [0, 1, PIECE, 7 * PIECE + 13])
@pytest.mark.parametrize("root", [0, -1])
def test_every_node_has_the_file(nodes, agree, disk, nbytes, root):
    root = root % nodes.size
    path = disk / "data.bin"
    if nodes.rank == root:
        path.write_bytes(content(nbytes))
        path.chmod(0o6640)  # setuid and setgid stay behind
    agree(True)

    found = broadcast_file(path, root=root, world=nodes)

    agree(found == path and found.read_bytes() == content(nbytes), found)
    has_the_source = root in nodes.layout.nodes[nodes.node_rank]
    rights = 0o6640 if has_the_source else 0o640
    agree(path.stat().st_mode & 0o7777 == rights, oct(path.stat().st_mode))
    agree(everything_in(disk) == ["data.bin"], everything_in(disk))


def test_to_another_place(nodes, agree, disk, shared_tmp_path):
    source, target = shared_tmp_path / "common.bin", disk / "new" / "folder" / "copy.bin"
    if nodes.rank == 0:
        source.write_bytes(content(3000))
    agree(True)
    found = broadcast_file(str(source), to=str(target), world=nodes)
    agree(found == target and target.read_bytes() == content(3000), found)
    agree(everything_in(disk) == ["new/folder/copy.bin"], everything_in(disk))


def test_what_is_there_is_left_alone(nodes, agree, disk, shared_tmp_path):
    """By inode and time of change: a file that was written anew has others."""
    source, target = shared_tmp_path / "common.bin", disk / "copy.bin"
    if nodes.rank == 0:
        source.write_bytes(content(3000))
    if is_first(nodes) and nodes.node_rank % 2 == 0:
        target.write_bytes(content(3000))
    elif is_first(nodes):
        target.write_bytes(content(3000)[:-1] + b"?")  # as long, but another
    agree(True)
    before = target.stat()
    broadcast_file(source, to=target, world=nodes)
    after = target.stat()
    kept = (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    agree(kept == (nodes.node_rank % 2 == 0), f"node {nodes.node_rank} kept its file: {kept}")
    agree(target.read_bytes() == content(3000))
    broadcast_file(source, to=target, world=nodes)
    agree(target.stat() == after or target.stat().st_ino == after.st_ino, "written again")
    broadcast_file(source, world=nodes)
    agree(everything_in(disk) == ["copy.bin"], everything_in(disk))


def test_a_folder_that_nodes_share_is_written_to_once(nodes, agree, shared_tmp_path):
    """Every second node has a disk of its own, the others one in common."""
    common = nodes.node_rank % 2 == 0
    source = shared_tmp_path / "source.bin"
    folder = shared_tmp_path / ("common" if common else f"disk{nodes.node_rank}")
    target = folder / "copy.bin"
    copies = 1 + nodes.num_nodes // 2
    nbytes = 300 * PIECE
    if nodes.rank == 0:
        source.write_bytes(content(nbytes))
    agree(True)

    before = psutil.Process().io_counters()
    broadcast_file(source, nodes, to=target)
    written = psutil.Process().io_counters().write_chars - before.write_chars

    written = sum(mpiddl.gather_json(written, world=nodes))
    agree(copies * nbytes <= written < (copies + 0.5) * nbytes, f"{written} bytes, {copies} copies")
    agree(target.read_bytes() == content(nbytes))
    agree(everything_in(folder) == ["copy.bin"], everything_in(folder))

    before = psutil.Process().io_counters()
    broadcast_file(source, nodes)
    read = psutil.Process().io_counters().read_chars - before.read_chars
    agree(read < nbytes, f"the file that all nodes see was read: {read} bytes")


def error_of(function, *arguments, **options):
    """What a DataError says that all ranks raised."""
    try:
        function(*arguments, **options)
    except DataError as error:
        return str(error) if error.on_every_rank else "raised on this rank alone"
    return "nothing was raised"


def test_no_file_to_send(nodes, agree, disk):
    last = nodes.size - 1
    for source, message in ((disk / "none", "No such file"), (disk, "not a file")):
        said = error_of(broadcast_file, source, root=last, world=nodes)
        agree("cannot read" in said and message in said, said)
        agree(f"pass a file that rank {last} has" in said, said)
    pipe = disk / "pipe"
    if nodes.rank == last:
        os.mkfifo(pipe)
    said = error_of(broadcast_file, pipe, root=last, world=nodes)
    agree("not a file" in said, said)


def test_a_node_that_cannot_write(nodes, agree, disk, shared_tmp_path):
    source = shared_tmp_path / "common.bin"
    blocked = nodes.node_rank == nodes.num_nodes - 1
    if nodes.rank == 0:
        source.write_bytes(content(3000))
    if is_first(nodes):
        (disk / "file").touch()
    agree(True)
    target = disk / ("file/copy.bin" if blocked else "copy.bin")
    said = error_of(broadcast_file, source, to=target, world=nodes)
    agree("cannot" in said and "Not a directory" in said, said)
    agree(everything_in(disk) == ["file"], everything_in(disk))


@contextmanager
def little_room(nbytes):
    """This process may write files of so many bytes: a disk that is full for it alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_node_without_room(nodes, agree, disk, shared_tmp_path):
    source, target = shared_tmp_path / "common.bin", disk / "copy.bin"
    if nodes.rank == 0:
        source.write_bytes(content(9000))
    if is_first(nodes):
        target.write_bytes(b"the old one")
    agree(True)
    full = nodes.node_rank == nodes.num_nodes - 1
    with little_room(5000 if full else resource.RLIM_INFINITY):
        said = error_of(broadcast_file, source, to=target, world=nodes)
    agree(re.search(r"cannot write 8.8KiB to .*File too large.*; make room", said), said)
    agree(everything_in(disk) == ["copy.bin"], everything_in(disk))
    agree(target.read_bytes() == b"the old one")


def test_ranks_that_cannot_read_it(nodes, agree, disk):
    """Ranks of one node that name another place than the one that writes."""
    if nodes.local_size == 1 or nodes.num_nodes > 1:
        pytest.skip("needs several ranks on a node")
    path = disk / "data.bin"
    if nodes.rank == 0:
        path.write_bytes(b"here")
    said = error_of(broadcast_file, path if nodes.rank == 0 else disk / "elsewhere", world=nodes)
    agree("rank 1 on" in said and "elsewhere" in said and "pass to=..." in said, said)


def test_a_file_that_changes_meanwhile(agree, tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(content(5000))
    with files._Source(path) as source:
        first = source.read(slice(0, 2000))
        unchanged = source.problem()
        with path.open("r+b") as stream:
            stream.truncate(3000)
        with pytest.raises(OSError, match="became shorter while it was read"):
            source.read(slice(2000, 5000))
        agree(first.tobytes() == content(5000)[:2000] and unchanged is None, unchanged)
        agree("was changed while it was read" in str(source.problem()), source.problem())


def test_a_copy_that_arrives_damaged(agree, tmp_path):
    with files._Part(tmp_path / "copy", 0o600) as part:
        part.claim(8)
        part.write(numpy.arange(8, dtype=numpy.uint8))
        said = part.finish(0)
        agree("copy arrived damaged (8 of 8 bytes, checksum" in said, said)
    with files._Part(tmp_path / "copy", 0o600) as part:
        part.claim(8)
        part.write(numpy.arange(4, dtype=numpy.uint8))
        said = part.finish(part._checksum)
        agree("(4 of 8 bytes" in said, said)
    agree(everything_in(tmp_path) == [], everything_in(tmp_path))


@pytest.mark.parametrize("who", ["reader", "writer"])
@pytest.mark.parametrize("when", [0, 3, 9])
def test_who_fails_in_the_middle_takes_part_to_the_end(nodes, agree, who, when):
    """Ten pieces; afterwards, or earlier, all have heard of it, and collectives work."""
    writers = relay.writers_of(nodes, 0)
    failing = 0 if who == "reader" else writers[-1]
    calls = {"reader": 0, "writer": 0}

    def read():
        fail("reader")
        return numpy.full(PIECE, calls["reader"], dtype=numpy.uint8)

    def write(piece):
        fail("writer")

    def fail(what):
        calls[what] += 1
        if nodes.rank == failing and what == who and calls[what] == when + 1:
            raise OSError(5, "broken on purpose")

    def work():
        with Relay(writers, 0, nodes, 10 * PIECE, "copying data") as pieces:
            groups.append(pieces._group)
            for _ in range(10):
                pieces.pass_on(PIECE, read, write)
            pieces.check()

    groups = []
    said = error_of(work)
    agree("copying data failed (broken on purpose)" in said, said)
    agree(nodes.rank != failing or calls[who] == when + 1, "went on after it had failed")
    agree(groups[0] is None or groups[0]._closed, "communicators are lost")
    agree(relay.gather_json(nodes.rank, world=nodes) == list(range(nodes.size)))


def test_early_failures_are_heard_of_early(nodes, agree):
    passed = []

    def read():
        passed.append(1)
        if len(passed) == 3:
            raise OSError("broken on purpose")
        return numpy.zeros(PIECE, dtype=numpy.uint8)

    def work():
        with Relay(relay.writers_of(nodes, 0), 0, nodes, 100 * PIECE, "copying") as pieces:
            for number in range(100):
                pieces.pass_on(PIECE, read, None)
                passed_last[0] = number

    passed_last = [0]
    said = error_of(work)
    agree("broken on purpose" in said and passed_last[0] < 8, f"{passed_last}: {said}")


# Progress: of rank 0, on this rank's own stderr.


@pytest.fixture
def impatient(monkeypatch):
    """Shows something at once."""
    monkeypatch.setattr(progress_bar, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(progress_bar, "REFRESH_SECONDS", 0)
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0)


@contextmanager
def terminal(monkeypatch):
    """A terminal as stderr; the list fills with what it was shown at the end."""
    ours, theirs = pty.openpty()
    shown = []
    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        yield shown
        stream.flush()
        stream.write("end")
        stream.flush()
        while not shown or b"end" not in shown[-1]:
            shown.append(os.read(ours, 100_000))
    os.close(ours)
    shown[:] = [re.sub(r"\x1b\[[0-9;]*m", "", b"".join(shown).decode())]  # without colours


def test_a_bar_on_a_terminal(agree, world, impatient, monkeypatch):
    threads = threading.active_count()
    with terminal(monkeypatch) as shown, progress(4 << 20, "copying [x]", world) as bar:
        for _ in range(4):
            bar.advance(1 << 20)
        agree(threading.active_count() == threads, "a thread draws it")
    (text,) = shown
    agree(bool(re.search(r"copying \[x\].*4\.0/4\.0 MiB", text)) == (world.rank == 0), text)
    agree((text == "end") == (world.rank > 0), text)


def test_the_terminal_is_given_back_after_a_failure(agree, world, impatient, monkeypatch):
    def work():
        with progress(10, "mixing", world, "samples") as bar:
            bar.advance(3)
            raise KeyError

    with terminal(monkeypatch) as shown, pytest.raises(KeyError):
        work()
    (text,) = shown
    agree(("3/10 samples" in text) == (world.rank == 0), text)
    hidden, back = text.count("\x1b[?25l"), text.count("\x1b[?25h")
    agree(hidden == back == (world.rank == 0), f"the cursor is hidden: {text!r}")


def test_lines_in_a_log(agree, world, impatient, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress(4 << 20, "copying", world) as bar:
        bar.advance(1 << 20)
    with progress(2000, "mixing", world, "samples") as bar:
        bar.advance(500)
    lines = log.getvalue().splitlines()
    patterns = [
        r"mpiddl: copying: 25%, 1MiB of 4MiB, \S+[KMGT]?i?B/s",
        r"mpiddl: mixing: 25%, 500 of 2,000 samples, [\d,]+/s",
    ] * (world.rank == 0)
    agree(len(lines) == len(patterns) and all(map(re.fullmatch, patterns, lines)), lines)


def test_short_work_shows_nothing(agree, world, monkeypatch):
    monkeypatch.setattr(progress_bar, "PATIENCE_SECONDS", 1000)
    log = io.StringIO()
    with terminal(monkeypatch) as shown, progress(10, "copying", world) as bar:
        bar.advance(10)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 1000)
    with progress(10, "copying", world) as bar:
        bar.advance(10)
    agree(shown == ["end"] and log.getvalue() == "", (shown, log.getvalue()))
