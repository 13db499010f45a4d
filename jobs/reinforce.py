"""Learn to balance a pole on a cart from rewards alone: REINFORCE on gymnasium's CartPole-v1.

    mpirun -n 2 python jobs/reinforce.py --out runs/reinforce

An epoch is one update, from --batch-size episodes that are dealt out to the ranks. After 70 of
them, in 15 seconds on two ranks, the last 100 episodes have a mean return of 475, which is when
gymnasium calls it solved; 500 is the most. Chance in an episode follows from its number and --seed
alone, so that it is the same on whichever rank it is played. Needs pip install 'mpiddl[jobs]'.
What mpiddl needs is marked (1) to (6); the rest is what the same program would do on one rank.

Source:
    Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning", Machine Learning 8, 1992, 229-256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium
import numpy
import torch
import typer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import mpiddl
from mpiddl import job

NAME = "CartPole-v1"
WINDOW = 100  # episodes that decide whether it is solved


class Episode:
    """A game from its beginning, which the seed decides, to its end."""

    def __init__(self, environment: gymnasium.Env, seed: Sequence[int]) -> None:
        self.environment = environment
        self.chance = numpy.random.default_rng(seed)
        self.seen, _ = environment.reset(seed=int(self.chance.integers(2**31)))
        self.over = False
        self.observations: list[numpy.ndarray] = []
        self.actions: list[float] = []  # 0 pushes the cart to the left, 1 to the right
        self.rewards: list[float] = []

    def move(self, probability_of_right: float) -> None:
        """Push the cart once."""
        action = int(self.chance.random() < probability_of_right)
        self.observations.append(self.seen)
        self.actions.append(action)
        self.seen, reward, fallen, too_long, _ = self.environment.step(action)
        self.rewards.append(float(reward))
        self.over = fallen or too_long

    def returns(self, discount: float) -> list[float]:
        """For each move the rewards that came after it, later ones discounted."""
        returns = [0.0]
        for reward in reversed(self.rewards):
            returns.append(reward + discount * returns[-1])
        return returns[:0:-1]


@torch.no_grad()
def play(policy: nn.Module, episodes: Sequence[Episode], device: torch.device) -> None:
    """Play all episodes to their ends, a move of each at a time."""
    going = list(episodes)
    while going:
        seen = numpy.stack([episode.seen for episode in going])
        probabilities = policy(torch.from_numpy(seen).to(device, torch.float64)).sigmoid()
        for episode, probability in zip(going, probabilities.tolist(), strict=True):
            episode.move(probability)
        going = [episode for episode in going if not episode.over]


def moves_of(
    episodes: Sequence[Episode], discount: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observation, action and return of every move; of none, if there are no episodes."""
    observations = [seen for episode in episodes for seen in episode.observations]
    actions = [action for episode in episodes for action in episode.actions]
    returns = [value for episode in episodes for value in episode.returns(discount)]
    return (
        torch.tensor(numpy.array(observations).reshape(-1, 4), dtype=torch.float64, device=device),
        torch.tensor(actions, dtype=torch.float64, device=device),
        torch.tensor(returns, dtype=torch.float64, device=device),
    )


def normalised(returns: torch.Tensor) -> tuple[torch.Tensor, int]:
    """With mean 0 and variance 1 over the moves of all ranks; and how many moves these are."""
    sums = torch.stack([torch.ones_like(returns), returns, returns**2]).sum(1)
    count, total, squares = mpiddl.all_reduce(sums, op="sum").tolist()
    mean = total / count
    return (returns - mean) / max(squares / count - mean**2, 1e-9) ** 0.5, int(count)


def make_policy(hidden: int) -> nn.Module:
    """From what is seen to how much rather to push to the right.

    In double precision: rounding, which depends on how many episodes a rank has, must not decide
    where the cart is pushed.
    """
    layers = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Flatten(0))
    return layers.double()


def is_solved(history: Sequence[dict[str, float]], batch_size: int) -> bool:
    """Whether the last ``WINDOW`` episodes, with the rest of their update, did well enough."""
    last = history[-math.ceil(WINDOW / batch_size) :]
    mean = sum(row["mean_return"] for row in last) / len(last)
    return len(last) * batch_size >= WINDOW and mean >= gymnasium.spec(NAME).reward_threshold


@dataclass
class Flags(job.Flags):
    """Of every job, and of this one."""

    out: Path = Path("runs/reinforce")
    epochs: Annotated[int, typer.Option(min=1, help="Updates, at most.")] = 150
    batch_size: Annotated[
        int, typer.Option(min=1, help="Episodes in an update, over all ranks.")
    ] = 20
    lr: float = 1e-2
    checkpoint_every: int = 10
    discount: Annotated[float, typer.Option(min=0, max=1, help="Of later rewards.")] = 0.99
    hidden: Annotated[int, typer.Option(min=1, help="Units of the hidden layer.")] = 64


def main(flags: Flags) -> None:
    """Learn to balance a pole by policy gradient; all ranks play."""
    world = mpiddl.init()  # (1) rank, size, device

    mpiddl.seed(flags.seed)  # the same weights everywhere
    model = mpiddl.DataParallel(  # (2)
        make_policy(flags.hidden).to(world.device),
        bucket_size=flags.bucket_size,
        algorithm=flags.algorithm,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)
    mine = range(world.rank, flags.batch_size, world.size)  # (3) the episodes of this rank
    environments = {number: gymnasium.make(NAME) for number in mine}

    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer)
    for update in run.epochs():
        if run.steps < update:  # else the checkpoint was saved after it
            episodes = [
                Episode(environment, [flags.seed, update, number])
                for number, environment in environments.items()
            ]
            play(model.module, episodes, world.device)
            observations, actions, returns = moves_of(episodes, flags.discount, world.device)
            advantages, moves = normalised(returns)
            optimizer.zero_grad()
            # (4) Weight gradients by true counts: episodes are of different length
            with model.batch(local=len(actions), total=moves):
                loss = binary_cross_entropy_with_logits(model(observations), actions, advantages)
                loss.backward()
            optimizer.step()
            rewards = sum(sum(episode.rewards) for episode in episodes)
            run.step(len(episodes), mean_return=rewards / max(1, len(episodes)))
        run.epoch_ends()
        if is_solved(run.history, flags.batch_size):
            break
    run.finish(NAME)  # (6) all ranks hold the same bits; writes the model
    if world.rank == 0:
        said = "solved" if is_solved(run.history, flags.batch_size) else "not solved yet"
        print(f"{said} after {run.steps} updates")


if __name__ == "__main__":
    job.start(main, Flags)
