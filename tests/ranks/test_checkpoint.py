"""Save, stop, load, go on: against a run that never stopped."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.checkpoint.folders import checkpoints
from mpiddl.checkpoint.index import read_index
from mpiddl.comm.tuning import Choice
from mpiddl.errors import CheckpointError

ROWS = 37


@pytest.fixture
def folder(tmp_path, world):
    """The same on every rank."""
    return Path(mpiddl.broadcast_json(str(tmp_path)))


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
    files = read_index(path).files
    assert len(files) == (world.size if sharded else 1)


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
    with pytest.raises(CheckpointError, match="no checkpoint was written"):
        mpiddl.checkpoint.save(folder, 1, value=tensor)
    assert not list(folder.glob(".writing*"))
    mpiddl.barrier()


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
