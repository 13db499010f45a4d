"""Forty faults that a change might bring into the core, and the tests that ought to see each."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "Fault"]


class Fault(NamedTuple):
    """One wrong line.

    Attributes:
        name: What is wrong, in a few words.
        file: The module, below ``src/mpiddl``.
        right: Text that occurs once in it.
        wrong: What takes its place.
        tests: Files that are tried first, below ``tests``; if they notice nothing, all are.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


RING = "collectives/ring.py"
LANE = "collectives/node/lane.py"
SHARED = "collectives/node/shared.py"
QUICK = "api/short_way.py"
ENGINE = "engine/engine.py"
SCHEDULER = "engine/scheduler.py"
ALL_REDUCE = ("ranks/test_all_reduce.py", "ranks/test_every_collective.py")
WINDOWS = ("ranks/test_windows.py", "ranks/test_every_collective.py")
LATE = ("ranks/test_late_device.py", "ranks/test_late_buckets.py")
TRAINING = ("ranks/test_data_parallel.py", "ranks/test_engine.py")
CHECKPOINT = ("unit/test_checkpoint_files.py", "ranks/test_checkpoint.py")

FAULTS = (
    # Algorithms.
    Fault(
        "ring: receives into the segment that it sends",
        RING,
        "                incoming = chunks[(rank - step - 1) % size][index]\n",
        "                incoming = chunks[(rank - step) % size][index]\n",
        ALL_REDUCE,
    ),
    Fault(
        "ring: weighs the first chunk only",
        RING,
        "if step == 0 and reduction.weight is not None:",
        "if turn == 0 and reduction.weight is not None:",
        ALL_REDUCE,
    ),
    Fault(
        "ring: adds from the wrong slot of scratch",
        RING,
        "arrived = slots[(turn - lag) % (lag + 1)]",
        "arrived = slots[turn % (lag + 1)]",
        ALL_REDUCE,
    ),
    Fault(
        "ring: sends before the device has written",
        RING,
        "                yield device.fence()  # what is sent",
        "                pass  # what is sent",
        LATE,
    ),
    Fault(
        "reduce-scatter: leaves the own contribution out",
        "collectives/reduce_scatter.py",
        "parts[rank] = chunks[rank][done]",
        "parts[rank] = parts[rank - 1]",
        ALL_REDUCE,
    ),
    Fault(
        "reduce-scatter: takes the own weight for everyone's",
        "collectives/reduce_scatter.py",
        "return [float(weight) for weight in weights]",
        "return [float(mine[0]) for weight in weights]",
        ALL_REDUCE,
    ),
    Fault(
        "doubling: one partner too many is folded in",
        "collectives/doubling.py",
        "if peer_place < extra else",
        "if peer_place <= extra else",
        ALL_REDUCE,
    ),
    Fault(
        "doubling: rounds 16-bit floats at every step",
        "collectives/doubling.py",
        "dtype = torch.float32 if halves else buffer.dtype",
        "dtype = buffer.dtype",
        ALL_REDUCE,
    ),
    Fault(
        "hierarchical: weighs twice",
        "collectives/node/hierarchical.py",
        "summed = Reduction(reduction.op)",
        "summed = reduction",
        ("ranks/test_nodes.py",),
    ),
    Fault(
        "hierarchical: as many segments as the largest node has ranks",
        "collectives/node/hierarchical.py",
        "num_segments = min(",
        "num_segments = max(",
        ("ranks/test_nodes.py",),
    ),
    Fault(
        "segments: the longer ones come last",
        "base/segments.py",
        "min(part, longer)",
        "max(0, part - parts + longer)",
        ("unit/test_arithmetic.py", *ALL_REDUCE),
    ),
    # Where the ranks of a node meet.
    Fault(
        "lane: does not wait for the turn that is asked for",
        LANE,
        "< self._turn:\n",
        "< self._turn - 1:\n",
        WINDOWS,
    ),
    Fault(
        "lane: the short way goes on a turn early",
        LANE,
        "while counters[at] < turn:",
        "while counters[at] < turn - 1:",
        WINDOWS,
    ),
    Fault(
        "lane: a note goes to the place of another turn",
        LANE,
        "at = self._own + (1 + parity) * LINE // 8",
        "at = self._own + (2 - parity) * LINE // 8",
        WINDOWS,
    ),
    Fault(
        "lane: the weight of the first rank counts for all",
        LANE,
        "weights.append(self._weights[at + 3])",
        "weights.append(self._weights[self.counter_at[0] + line + 3])",
        ("ranks/test_data_parallel.py", *WINDOWS),
    ),
    Fault(
        "shared: a small buffer is shown where the last one was",
        SHARED,
        "lane.shown(buffer, (lane.turn + 1) % 2)[lane.rank]",
        "lane.shown(buffer, lane.turn % 2)[lane.rank]",
        WINDOWS,
    ),
    Fault(
        "shared: the sum is not handed to the last rank",
        "collectives/node/node_buffers.py",
        "self._device.combine(op, parts, self._weights, in_turn(parts, self._lane.rank))",
        "self._device.combine(op, parts, self._weights, in_turn(parts, self._lane.rank)[:-1])",
        WINDOWS,
    ),
    Fault(
        "shared: writes through the kernel to the wrong place",
        "collectives/node/node_buffers.py",
        "self._reach.write(mine.data_ptr(), mine.nbytes, peer, address + start)",
        "self._reach.write(mine.data_ptr(), mine.nbytes, peer, address)",
        WINDOWS,
    ),
    Fault(
        "short way: takes no tag, which other ranks do",
        QUICK,
        "            self._next_tag()",
        "            pass",
        WINDOWS,
    ),
    Fault(
        "short way: keeps the plans of an older tuning table",
        QUICK,
        "if self._tuned is not self._world.tuned:",
        "if self._tuned is None:",
        ("ranks/test_checkpoint.py", "ranks/test_nodes.py"),
    ),
    Fault(
        "windows: takes memory behind a window for the window's",
        "comm/windows.py",
        "if offset < mapped.part_bytes and mapped.memory() is not None:",
        "if mapped.memory() is not None:",
        WINDOWS,
    ),
    Fault(
        "messages: large ones lose what is behind the first piece",
        "comm/messages.py",
        "            for piece in pieces\n",
        "            for piece in pieces[:1]\n",
        ("ranks/test_large.py", *ALL_REDUCE),
    ),
    Fault(
        "host: adds sixteen-bit floats in sixteen bits",
        "devices/host.py",
        "narrow = target.dtype.itemsize == 2 and target.is_floating_point()",
        "narrow = False",
        ("unit/test_host.py",),
    ),
    # Engine, buckets, training.
    Fault(
        "engine: the least urgent bucket goes first",
        ENGINE,
        "return -work.priority",
        "return work.priority",
        ("ranks/test_engine.py",),
    ),
    Fault(
        "engine: does not ask urgent works again",
        ENGINE,
        "if turns == TURNS:",
        "if turns > TURNS:",
        ("ranks/test_engine.py",),
    ),
    Fault(
        "scheduler: starts a bucket one gradient early",
        SCHEDULER,
        "            if not bucket.num_missing:\n",
        "            if bucket.num_missing <= 1:\n",
        TRAINING,
    ),
    Fault(
        "scheduler: ordered algorithms start in any order",
        SCHEDULER,
        "        if not self._reductions.ordered:\n",
        "        if True:\n",
        TRAINING,
    ),
    Fault(
        "gradients: pieces are copied whatever the strides",
        "gradients/arena.py",
        "if len(self._pieces[member]) > 1 and gradient.stride() == view.stride():",
        "if len(self._pieces[member]) > 1:",
        TRAINING,
    ),
    Fault(
        "plan: an empty gradient at a cut is in no bucket",
        "gradients/plan.py",
        "max(offsets[m], offsets[m] + parameters[m].length - 1) >= cut",
        "offsets[m] + parameters[m].length - 1 >= cut",
        ("unit/test_arithmetic.py", "unit/test_gradients.py", *TRAINING),
    ),
    Fault(
        "training: every rank weighs the same, whatever it holds",
        "strategies/weights.py",
        "return 1 / self._size if samples is None or total is None else samples / total",
        "return 1 / self._size",
        TRAINING,
    ),
    Fault(
        "unused: forgets gradients from before",
        "strategies/unused.py",
        "sorted(self._nowhere & self._empty)",
        "sorted(self._nowhere)",
        ("ranks/test_unused.py",),
    ),
    Fault(
        "SyncBatchNorm: the running variance is biased",
        "training/sync_batch_norm.py",
        "variance * (count / (count - 1))",
        "variance * 1",
        ("ranks/test_sync_batch_norm.py",),
    ),
    Fault(
        "join: who has left stays away from sums",
        "training/join/join.py",
        "all_reduce(torch.zeros(heard.subject, dtype=torch.float64), world=world)",
        "pass",
        ("ranks/test_join.py",),
    ),
    # Data.
    Fault(
        "permutation: not undone in reverse",
        "data/shards/permutation.py",
        "in reversed(range(ROUNDS)) if backwards else range(ROUNDS):",
        "in range(ROUNDS):",
        ("unit/test_permutation.py",),
    ),
    Fault(
        "stratified: batches are dealt to the same few ranks",
        "data/shards/kinds/stratified.py",
        "ranks: Indices = (cards + rounds // math.lcm(num_batches, size)) % size",
        "ranks: Indices = cards % size",
        ("unit/test_shardings.py",),
    ),
    Fault(
        "sampler: goes on after the last stop, not after all of them",
        "data/shards/batches.py",
        "step += legs.pop().steps",
        "legs.pop()",
        ("unit/test_sampling.py",),
    ),
    Fault(
        "strided: the last sample is nobody's",
        "data/shards/kinds/strided.py",
        "range(rank, self.length, size)",
        "range(rank, self.length - 1, size)",
        ("unit/test_shardings.py",),
    ),
    # Checkpoints.
    Fault(
        "checkpoint: one too few is kept",
        "checkpoint/folders.py",
        "found[: max(0, at + 1 - keep)]",
        "found[: max(0, at + 2 - keep)]",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: checksums are not looked at",
        "checkpoint/folders.py",
        "read_index(path).verify(path, tick)",
        "read_index(path)",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: the same step replaces the one that is there",
        "checkpoint/folders.py",
        "while (folder / name).exists():",
        "while False:",
        CHECKPOINT,
    ),
)
