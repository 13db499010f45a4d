"""Save, stop, load, go on: against a run that never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.api import fail_together
from mpiddl.checkpoint import index, tensors
from mpiddl.checkpoint.folders import checkpoints
from mpiddl.checkpoint.index import checksum, read_index
from mpiddl.comm.tuning import Choice
from mpiddl.errors import CheckpointError
from mpiddl.observe import activity

ROWS = 37


@pytest.fixture
def folder(shared_tmp_path):
    """The same on every rank."""
    return shared_tmp_path


class Training:
    """A model, an optimizer, a schedule, batches, and the loop that a user would write."""

    def __init__(self, world, dropout=0.0, width=16, bucket_size=200, wrapped=True):
        torch.manual_seed(3)
        layers = [nn.Linear(6, width), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, 1)]
        model = nn.Sequential(*layers).double()
        self.model = mpiddl.DataParallel(model, world=world, bucket_size=bucket_size)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5], gamma=0.5)
        self.batches = mpiddl.ShardBatchSampler(ROWS, world, batch_size=8, seed=1)
        self.inputs = torch.linspace(-1, 1, ROWS * 6, dtype=torch.float64).sin().view(ROWS, 6)
        self.world = world
        self.done = 0

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def steps(self, number):
        """So many more of the present epoch."""
        for count, part in enumerate(self.batches, 1):
            total = self.batches.total
            x = self.inputs[part]
            self.optimizer.zero_grad()
            with self.model.batch(local=len(part), total=total):
                mse_loss(self.model(x), x.sum(1, keepdim=True)).backward()
            self.optimizer.step()
            self.schedule.step()
            self.done = count
            if count == number:
                return

    def save(self, folder, step=0, **options):
        state = self.batches.state_dict(self.done)
        return mpiddl.checkpoint.save(
            folder, step, world=self.world, batches=state, **self.parts, **options
        )

    def load(self, folder):
        return mpiddl.checkpoint.load(folder, world=self.world, batches=self.batches, **self.parts)

    def parameters(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("sharded", [False, True])
def test_going_on_ends_with_the_same_bits(world, folder, sharded):
    mpiddl.seed(5, rank=world.rank)
    whole = Training(world, dropout=0.3)
    whole.steps(2)
    path = whole.save(folder, 2, sharded=sharded)
    # The rest of the epoch, from here and from the file.
    whole.batches.load_state_dict(whole.batches.state_dict(2))
    whole.steps(3)

    mpiddl.seed(6, rank=world.rank)
    again = Training(world, dropout=0.3)
    found = again.load(folder)
    again.steps(3)

    assert found == (2, path, {}, True)
    assert all(map(torch.equal, again.parameters(), whole.parameters()))
    assert again.schedule.get_last_lr() == whole.schedule.get_last_lr()
    names = [name for name, _ in read_index(path).files]
    parts = [f"part-00{rank}.safetensors" for rank in range(world.size)]
    own = ["ranks.safetensors"] if world.size > 1 else []  # the random generators
    assert names == (parts if sharded else [parts[0], *own])


def test_going_on_with_other_ranks_ends_the_same_within_rounding(world, folder):
    """Saved by all ranks; the first two of them go on (or the one)."""
    whole = Training(world)
    whole.steps(2)
    whole.save(folder, 2)
    few = world.split(0 if world.rank < 2 else None)
    whole.batches.load_state_dict(whole.batches.state_dict(2))
    whole.steps(3)
    if few is not None:
        again = Training(few)
        found = again.load(folder)
        again.steps(3)
        assert found.same_ranks == (world.size <= 2)
        for one, other in zip(again.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    mpiddl.barrier()


def test_every_rank_goes_on_with_its_random_numbers(world, folder):
    mpiddl.seed(11, rank=world.rank)

    def draw():
        return [random.random(), numpy.random.rand(), torch.rand(3).tolist(), torch.randn(1).item()]

    draw()
    mpiddl.checkpoint.save(folder, 1)
    expected = draw()
    mpiddl.seed(12)
    assert mpiddl.checkpoint.load(folder).step == 1
    assert draw() == expected
    everyones = mpiddl.gather_json(expected)
    assert len({str(numbers) for numbers in everyones}) == world.size
    (path,) = checkpoints(folder)
    assert (path / "index.json").stat().st_size < 3000  # 5,000 bytes and more a rank
    mpiddl.barrier()


def test_random_numbers_go_on_from_a_checkpoint_of_version_1(world, folder):
    """Whose index has them, as text."""
    mpiddl.seed(11, rank=world.rank)
    torch.randn(1), random.gauss(0, 1), numpy.random.randn()
    version, words, spare = random.getstate()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    mine = {
        "python": [version, list(words), spare],
        "numpy": [name, keys.tobytes().hex(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    nodes = [list(ranks) for ranks in world.layout.nodes]
    everyones = mpiddl.gather_json(mine)
    if world.rank == 0:
        path = folder / "step-000000007"
        path.mkdir()
        file = path / "part-000.safetensors"
        save_file({"0": torch.arange(4.0, device="cpu").view(2, 2)}, file)
        body = json.dumps(
            {
                "step": 7,
                "parts": {"dict": [["value", {"tensor": 0}], ["other", {"tuple": [1, None]}]]},
                "tensors": [0],
                "strides": [[1, 2]],
                "files": [[file.name, checksum(file)]],
                "nodes": nodes,
                "random": everyones,
                "choices": {},
                "versions": {},
            }
        )
        head = {"mpiddl_checkpoint": 1, "sha256": hashlib.sha256(body.encode()).hexdigest()}
        (path / "index.json").write_text(f"{json.dumps(head)}\n{body}\n")
    mpiddl.barrier()

    def draw():
        return [random.gauss(0, 1), numpy.random.randn(2).tolist(), torch.randn(3).tolist()]

    expected = draw()
    mpiddl.seed(12)
    found = mpiddl.checkpoint.load(folder)
    assert draw() == expected
    assert (found.step, found.values["other"], found.same_ranks) == (7, (1, None), True)
    assert found.values["value"].tolist() == [[0, 1], [2, 3]]
    assert found.values["value"].stride() == (1, 2)


def test_what_was_measured_comes_back_and_is_not_measured_again(world, folder):
    """Engine, bucket size and order, as the steps of the first job found them out."""
    first = Training(world, bucket_size="auto")
    for _ in range(12):
        first.steps(5)
    first.save(folder, 1)
    choices = first.model.choices()

    again = Training(world, bucket_size="auto")
    assert again.model.choices() != choices
    again.load(folder)
    assert again.model.choices() == choices
    again.steps(1)
    assert again.model.plan == first.model.plan
    if world.size > 1:
        assert choices["settled"] is not None


def test_measuring_goes_on_where_nothing_was_found_out(world, folder):
    first = Training(world, bucket_size="auto")
    first.save(folder, 1)
    again = Training(world, bucket_size="auto")
    again.load(folder)
    if world.size > 1:
        assert again.model.choices()["settled"] is None


def test_values_and_parts_that_are_not_loaded(world, folder):
    value = {"a": [1, (2.5, None)], 3: torch.arange(4), "n": numpy.ones(2)}
    mpiddl.checkpoint.save(folder, 4, progress=value, more="text")
    found = mpiddl.checkpoint.load(folder, progress=None)
    assert found.step == 4
    assert found.values["more"] == "text"
    assert found.values["progress"]["a"] == [1, (2.5, None)]
    assert found.values["progress"][3].tolist() == [0, 1, 2, 3]
    assert found.values["progress"]["n"].tolist() == [1, 1]


def test_no_checkpoint_is_none(world, folder):
    assert mpiddl.checkpoint.load(folder / "none") is None
    assert mpiddl.checkpoint.latest(folder) is None


def test_only_the_newest_are_kept_and_a_named_one_can_be_loaded(world, folder):
    paths = [mpiddl.checkpoint.save(folder, step, keep=2, value=step) for step in (1, 2, 3)]
    mpiddl.barrier()
    assert checkpoints(folder) == paths[1:]
    assert mpiddl.checkpoint.load(paths[1]).values["value"] == 2
    assert mpiddl.checkpoint.load(folder).values["value"] == 3
    mpiddl.barrier()


def test_a_corrupted_one_is_passed_over(world, folder):
    mpiddl.checkpoint.save(folder, 1, value=torch.ones(9))
    path = mpiddl.checkpoint.save(folder, 2, value=torch.zeros(9))
    if world.rank == 0:
        file = path / "part-000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    mpiddl.barrier()
    assert mpiddl.checkpoint.load(folder).step == 1
    with pytest.raises(CheckpointError, match="truncated or corrupted"):
        mpiddl.checkpoint.load(path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda world: Training(world, width=17),
            r"'0.weight' is float64\[16, 6\] in the checkpoint",
        ),
        (
            lambda world: Training(world).model.float(),
            r"is float64\[16, 6\] .*, float32\[16, 6\] in this",
        ),
        (lambda world: nn.Linear(6, 16), "of another model"),
    ],
)
def test_a_checkpoint_of_another_model_changes_nothing(world, folder, other, words):
    Training(world).save(folder)
    made = other(world)
    model = getattr(made, "model", made)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match=words) as caught:
        mpiddl.checkpoint.load(folder, model=model)
    assert caught.value.on_every_rank
    assert all(map(torch.equal, model.parameters(), before))


def test_a_part_that_is_missing_is_named(world, folder):
    mpiddl.checkpoint.save(folder, 1, model=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="has no 'optimizer', only model"):
        mpiddl.checkpoint.load(folder, optimizer=torch.optim.SGD([torch.ones(1)], lr=1))


def test_a_sampler_of_another_data_set_is_told(world, folder):
    Training(world).save(folder)
    batches = mpiddl.ShardBatchSampler(ROWS + 1, world, batch_size=8, seed=1)
    with pytest.raises(CheckpointError, match="another the number of samples"):
        mpiddl.checkpoint.load(folder, batches=batches)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_cannot_be_written_is_an_error_on_every_rank(world, folder, sharded):
    """The place of a file is taken by a folder: not even root can write there."""
    blocked = folder / "blocked"
    if world.rank == 0:
        blocked.write_text("no folder")
    mpiddl.barrier()
    with pytest.raises(CheckpointError, match="no checkpoint was written to") as caught:
        mpiddl.checkpoint.save(blocked, 1, value=torch.ones(3), sharded=sharded)
    assert caught.value.on_every_rank


def test_fused_optimizers_of_channels_last_models_go_on_with_the_same_bits(world, folder):
    """They go through weights and their state as flat memory."""

    def make():
        torch.manual_seed(1)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(0, 1, 108).view(1, 3, 6, 6)).square().mean().backward()
        optimizer.step()

    whole, again = make(), make()
    step(*whole)
    mpiddl.checkpoint.save(folder, 1, model=whole[0], optimizer=whole[1])
    step(*whole)
    mpiddl.checkpoint.load(folder, model=again[0], optimizer=again[1])
    step(*again)
    assert torch.equal(again[0].weight, whole[0].weight)


def test_where_none_can_be_read_nothing_begins_anew(world, folder):
    path = mpiddl.checkpoint.save(folder, 1, value=1)
    if world.rank == 0:
        (path / "index.json").write_text("")
    mpiddl.barrier()
    with pytest.raises(CheckpointError, match="none of the checkpoints in"):
        mpiddl.checkpoint.load(folder)


def test_what_safetensors_does_not_know_is_an_error_on_every_rank(world, folder):
    tensor = torch.ones(3, dtype=torch.complex128)
    with pytest.raises(CheckpointError, match="no checkpoint was written") as caught:
        mpiddl.checkpoint.save(folder, 1, value=[1, {"a": tensor}])
    assert "the checkpoint['value'][1]['a'] is complex128" in str(caught.value)
    assert not list(folder.iterdir())
    mpiddl.barrier()


def test_what_one_rank_cannot_give_is_an_error_on_every_rank(world, folder):
    last = world.size - 1
    value = test_bad_arguments if world.rank == last else 1
    kind = TypeError if world.rank == last else CheckpointError
    with pytest.raises(kind, match=r"\['value'\] is a function") as caught:
        mpiddl.checkpoint.save(folder, 1, value=value)
    assert world.rank == last or f"rank {last} on " in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_of_what_was_not_written_nothing_is_left_for_any_rank_to_see(world, folder, sharded, agree):
    """The last rank that writes may have no large files; to remove what there is takes a while."""
    writers = world.size if sharded else 1
    values = [torch.full((4 << 20,), float(n), device="cpu") for n in range(writers)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == writers - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15 << 20, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large; those before it are kept"):
            mpiddl.checkpoint.save(folder, 1, values=values, sharded=sharded)
        left = os.listdir(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    agree(left == [], f"{left}")


def test_a_full_disk_for_what_is_a_ranks_own(world, folder, agree):
    """Rank 0 writes what others have, and cannot; nobody waits for ever."""
    value = torch.full((1 << 20,), float(world.rank), device="cpu")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((4 << 20) + (64 << 10), before[1]))
    try:
        if world.size > 2:  # two such tensors are too much for ranks.safetensors
            with pytest.raises(CheckpointError, match="File too large"):
                mpiddl.checkpoint.save(folder, 1, value=value)
            left = os.listdir(folder)
        else:
            mpiddl.checkpoint.save(folder, 1, value=value)
            left = []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    agree(left == [], f"{left}")


def test_who_waits_for_a_rank_that_works_sees_it_go_on(world, monkeypatch, agree):
    """Each piece of rank 0's work is a sign for the watchdogs of the others."""
    monkeypatch.setattr(fail_together, "SIGN_SECONDS", 0.0)
    moves = []

    def work(tick):
        for _ in range(5 if world.rank == 0 else 0):
            tick()
        moves.append(activity.moves())
        return world.rank

    assert fail_together.work_together(work, world) == world.rank
    moved = activity.moves() - moves[0]
    agree(world.rank == 0 or moved >= 6, f"{moved} signs")


@pytest.mark.parametrize("sharded", [False, True])
def test_writing_and_checking_are_signs_to_those_that_wait(
    world, folder, monkeypatch, agree, sharded
):
    """However slow the disk: each piece is one, if the one before it was long enough ago."""
    monkeypatch.setattr(fail_together, "SIGN_SECONDS", 0.0)
    for module in (tensors, index):
        monkeypatch.setattr(module, "PIECE_BYTES", 250)
    value = torch.zeros(100_000, dtype=torch.uint8)
    before = activity.moves()
    mpiddl.checkpoint.save(folder, 1, value=value, sharded=sharded)
    saved = activity.moves() - before
    mpiddl.checkpoint.load(folder)
    loaded = activity.moves() - before - saved
    agree(min(saved, loaded) >= 400, f"{saved} and {loaded} signs")


def test_what_one_rank_fails_at_others_hear_once_they_are_through(world):
    def work(tick):
        if world.rank == world.size - 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        fail_together.work_together(work, world, CheckpointError)
    assert caught.value.on_every_rank


class Counts(nn.Module):
    """Statistics of the samples that a rank has seen."""

    def __init__(self, rank):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.full((3,), float(rank)))
        self.register_buffer("var", torch.full((70,), float(rank)))
        self.register_buffer("seen", torch.tensor(rank))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_a_ranks_own_is_its_own_again_and_never_a_mixture(world, folder, sharded):
    """Running statistics and plain values, that all ranks go on from, or the first two of them."""
    torch.manual_seed(1)
    model, generator = Counts(world.rank), torch.Generator("cpu").manual_seed(world.rank)
    place = {"taken": world.rank, "draws": generator.get_state()}
    mpiddl.checkpoint.save(folder, 1, model=model, place=place, sharded=sharded)
    expected = torch.rand(2, generator=generator, device="cpu").tolist()

    few = world.split(0 if world.rank < 2 else None)
    for ranks in (world, few):
        if ranks is not None:
            again = Counts(-1)
            found = mpiddl.checkpoint.load(folder, world=ranks, model=again, place=None)
            own = world.rank if ranks.size == world.size else 0
            assert again.mean.tolist() == [own] * 3
            assert again.var.tolist() == [own] * 70
            assert again.seen == own
            assert torch.equal(again.layer.weight, model.layer.weight)
            assert found.values["place"]["taken"] == own
            generator.set_state(found.values["place"]["draws"])
            drawn = torch.rand(2, generator=generator, device="cpu").tolist()
            assert own != world.rank or drawn == expected
    mpiddl.barrier()


@pytest.mark.host
def test_a_model_is_loaded_into_its_own_memory(world, folder, agree):
    """A rank needs a few pieces of memory for it, not another model."""
    nbytes = 96 << 20
    model = nn.Linear(nbytes // 4, 1, bias=False)
    value = float(world.rank + 1)
    nn.init.constant_(model.weight, 3.0)
    mpiddl.checkpoint.save(folder, 1, model=model)
    nn.init.constant_(model.weight, value)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now
    before = memory_of("VmRSS")
    mpiddl.checkpoint.load(folder, model=model)
    grown = memory_of("VmHWM") - before
    assert (model.weight == 3).all()
    agree(grown < nbytes / 2, f"{grown >> 20} MiB more")


def memory_of(what):
    """Of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{what}:")[1].split()[0]) << 10


def test_parts_that_are_left_out_are_not_read(world, folder):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mpiddl.checkpoint.save(folder, 1, model=model, optimizer=optimizer, lr=0.5)
    assert mpiddl.checkpoint.load(folder, model=model).values == {"lr": 0.5}
    found = mpiddl.checkpoint.load(folder, optimizer=None).values
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_values_have_memory_of_their_own(world, folder):
    """Also where they were the model's when they were saved."""
    model = nn.Linear(2, 2)
    best = model.state_dict()
    mpiddl.checkpoint.save(folder, 1, model=model, best=best)
    found = mpiddl.checkpoint.load(folder, model=model)
    nn.init.zeros_(model.weight)
    assert found.values["best"]["weight"].abs().sum() > 0


class Wrapped(nn.Module):
    """As torch.compile wraps a module; quicker to import."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_a_model_is_loaded_with_torch_compile_and_without(world, folder):
    def compiled(model):
        return Wrapped(nn.Sequential(nn.Linear(2, 2), Wrapped(nn.Linear(2, 1))))

    def plain(model):
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    for step, (first, then) in enumerate([(compiled, plain), (plain, compiled)]):
        torch.manual_seed(1)
        model = first(world)
        mpiddl.checkpoint.save(folder, step, model=model)
        torch.manual_seed(2)
        other = then(world)
        mpiddl.checkpoint.load(folder, model=other)
        assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_state_takes_the_layout_of_the_parameter_that_it_belongs_to(world, folder):
    """Saved by a model in the order of dimensions, gone on with in channels_last."""

    def make(layout):
        model = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return model, torch.optim.Adam(model.parameters(), lr=1.0, amsgrad=True, fused=True)

    whole, again = make(torch.contiguous_format), make(torch.channels_last)
    for model, optimizer in (whole, again):
        for parameter in model.parameters():
            count = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(count % 7)
            nn.init.zeros_(parameter)
        if model is whole[0]:
            optimizer.step()
            mpiddl.checkpoint.save(folder, 1, model=model, optimizer=optimizer)
            optimizer.step()
    mpiddl.checkpoint.load(folder, model=again[0], optimizer=again[1])
    weight = again[0].weight
    state = again[1].state[weight]
    assert state["exp_avg"].stride() == weight.stride() != whole[0].weight.stride()
    again[1].step()
    assert torch.equal(weight, whole[0].weight)


class Precise(torch.optim.NAdam):
    """Keeps float32 copies of 16-bit parameters, as many do."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["master"] = parameter.detach().float() + 2**-20
                self.state[parameter]["more"] = [torch.tensor(1 + 2**-20)]


def test_state_keeps_dtype_and_bits(world, folder):
    """torch's own load_state_dict would round it to the parameter's dtype."""

    def make():
        model = nn.Linear(3, 2).bfloat16()
        return model, Precise(model.parameters(), lr=0.25)

    (model, optimizer), (other, again) = make(), make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    mpiddl.checkpoint.save(folder, 1, model=model, optimizer=optimizer)
    mpiddl.checkpoint.load(folder, model=other, optimizer=again)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        stored, loaded = optimizer.state[one], again.state[two]
        assert stored.keys() == loaded.keys()
        for name in ("master", "mu_product", "step", "exp_avg"):
            assert stored[name].dtype == loaded[name].dtype
            assert torch.equal(stored[name], loaded[name]), name
        assert torch.equal(stored["more"][0], loaded["more"][0])


def test_marks_on_memory_are_stored_as_values(world, folder):
    """Conjugated and negated tensors."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    mpiddl.checkpoint.save(folder, 1, values=[z, z.conj(), z.conj().imag])
    found = mpiddl.checkpoint.load(folder).values["values"]
    expected = [[1 + 2j, 3 - 4j], [1 - 2j, 3 + 4j], [-2, 4]]
    assert [tensor.tolist() for tensor in found] == expected


def test_nan_is_a_value_and_the_index_is_json(world, folder):
    value = [float("nan"), float("inf"), -float("inf"), numpy.float64("nan")]
    path = mpiddl.checkpoint.save(folder, 1, value=value)
    json.loads((path / "index.json").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert str(mpiddl.checkpoint.load(folder).values["value"]) == "[nan, inf, -inf, nan]"


def test_a_sampler_that_goes_on_at_the_very_end_of_an_epoch_has_whole_ones_after_it(world):
    def sampler():
        return mpiddl.ShardBatchSampler(ROWS, world, batch_size=8, seed=1)

    whole, again = sampler(), sampler()
    list(whole)
    again.load_state_dict(whole.state_dict(len(whole)))
    assert list(again) == []
    assert list(again) == list(whole)


def test_what_a_new_table_says_holds_for_calls_that_were_made_before(world):
    """The quick way of small all-reduces remembers; the long way (of an array) looks it up."""
    before = world.tuned
    try:
        mpiddl.all_reduce(torch.ones(4))
        world.tuned = [Choice(None, "ring", 1 << 20)]
        buffer = torch.ones(4) if world.rank == 0 else numpy.ones(4, dtype=numpy.float32)
        assert mpiddl.all_reduce(buffer).sum() == 4 * world.size
    finally:
        world.tuned = before


def test_bad_arguments(world, folder):
    with pytest.raises(ValueError, match="step=-1"):
        mpiddl.checkpoint.save(folder, -1)
    with pytest.raises(ValueError, match="keep=0"):
        mpiddl.checkpoint.save(folder, 1, keep=0)
    with pytest.raises(TypeError, match=r"\['model'\] is a function"):
        mpiddl.checkpoint.save(folder, 1, model=test_bad_arguments)
