"""Learning from rewards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows


def test_defaults_solve_it(start, tmp_path):
    job = start(2, program("reinforce", "--out", tmp_path))

    assert job.status == 0, job.both
    assert job.err == ""
    returns = [row["mean_return"] for row in rows(tmp_path)]
    assert f"\nsolved after {len(returns)} updates" in job.out
    assert len(returns) < 150
    assert returns[0] < 50
    assert sum(returns[-5:]) / 5 >= 475


@pytest.mark.by_day(0)
@pytest.mark.parametrize("episodes", [2, 7])  # one rank has none; ranks have different numbers
def test_world_size_changes_nothing(start, tmp_path, episodes):
    flags = ["--epochs", 5, "--batch-size", episodes]
    for ranks in (1, 3):
        job = start(ranks, program("reinforce", *flags, "--out", tmp_path / str(ranks)))
        assert job.status == 0, job.both
        assert "not solved yet after 5 updates" in job.out

    one, three = ([row["mean_return"] for row in rows(tmp_path / n)] for n in "13")
    assert one == pytest.approx(three, rel=1e-12)
    assert len({*one}) > 1
    parameters = [load_file(tmp_path / n / "model.safetensors") for n in "13"]
    for name, values in parameters[0].items():
        torch.testing.assert_close(values, parameters[1][name], atol=1e-9, rtol=0)


@pytest.mark.by_day(0)
def test_it_goes_on_after_any_update(start, tmp_path):
    """Checkpoints are saved after an update and before its epoch ends: no update comes twice."""
    flags = ["--epochs", 6, "--batch-size", 5, "--checkpoint-every", 4, "--out", tmp_path]
    job = start(2, program("reinforce", *flags))
    assert job.status == 0, job.both
    whole = (tmp_path / "model.safetensors").read_bytes()
    returns = [row["mean_return"] for row in rows(tmp_path)]

    assert forget_all_but_the_first_checkpoint(tmp_path) == 4
    job = start(2, program("reinforce", *flags, "--resume"))

    assert "goes on after step 4, in epoch 4" in job.out, job.both
    assert [row["mean_return"] for row in rows(tmp_path)] == returns
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def test_an_episode_follows_from_its_seed():
    reinforce = module("reinforce")
    device = torch.device("cpu")
    torch.manual_seed(0)
    policy = reinforce.make_policy(8)

    def played(*seeds):
        environments = [reinforce.gymnasium.make(reinforce.NAME) for _ in seeds]
        episodes = [
            reinforce.Episode(environment, seed)
            for environment, seed in zip(environments, seeds, strict=True)
        ]
        reinforce.play(policy, episodes, device)
        return [reinforce.moves_of([episode], 0.9, device) for episode in episodes]

    alone, together = played([0, 1, 2]), played([0, 1, 3], [0, 1, 2])
    for one, other in zip(alone[0], together[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(together[0][0][0], together[1][0][0])


def test_returns_are_of_what_comes_after():
    reinforce = module("reinforce")
    episode = reinforce.Episode(reinforce.gymnasium.make(reinforce.NAME), [0])
    episode.rewards = [1.0, 0.0, 4.0]
    assert episode.returns(0.5) == [2.0, 2.0, 4.0]
    assert episode.returns(1) == [5.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("returns", "batch_size", "solved"),
    [
        ([500] * 5, 20, True),
        ([500] * 4, 20, False),  # 80 episodes
        ([0] + [475] * 4, 30, True),  # 120 are the last 100 and the rest of an update
        ([475] * 4 + [474], 20, False),
        ([475], 200, True),
    ],
)
def test_solved_is_a_mean_over_100_episodes(returns, batch_size, solved):
    history = [{"mean_return": value} for value in returns]
    assert module("reinforce").is_solved(history, batch_size) == solved


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--discount", "2"], "--discount"), (["--out", "/proc/none"], "cannot write")],
)
def test_bad_flags_get_one_clear_message(start, flags, words):
    job = start(2, program("reinforce", *flags))

    assert job.status == 2
    assert job.both.count("Usage:") == 1
    assert words in " ".join(job.both.split())
    assert "Traceback" not in job.both
