"""Metrics over all ranks: every sample counts once, ranks may have different numbers of them.

``update`` counts on this rank and sends nothing; ``compute`` is collective and gives every rank the
same bits. A sample that cannot be counted (a label that is no class, a score that is NaN) is a
DataError in ``compute``, on every rank, and so are no samples at all; a wrong shape is one in
``update``.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.api.all_reduce import all_reduce
from mpiddl.api.fail_together import raise_together
from mpiddl.comm.world import World, current_world
from mpiddl.data.evaluating.predictions import gather_tensors
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["AUC", "Accuracy", "ConfusionMatrix", "Mean"]


class _Metric:
    """The first fault among this rank's samples, and sums over ranks."""

    @checks_world
    def __init__(self, world: World | None = None) -> None:
        self._given_world = world
        self.reset()

    def reset(self) -> None:
        """Forget all samples, on this rank."""
        self._problem: str | None = None

    @property
    def _world(self) -> World:
        return self._given_world or current_world()

    def _refuses(self, problem: str | None) -> bool:
        """Whether a batch cannot be counted; remembered for ``compute``."""
        self._problem = self._problem or problem
        return problem is not None

    def _total(self, count: int) -> int:
        """Samples over all ranks. Collective.

        Raises:
            DataError: On every rank: there are none, or a rank met one that cannot be counted.
        """
        raise_together(self._problem, self._world)
        total = int(self._sum(numpy.array([count]))[0])
        if total == 0:
            problem = "no samples were counted on any rank: call update() before compute()"
            raise DataError(problem, on_every_rank=True)
        return total

    def _sum(self, values: NDArray[Any]) -> NDArray[Any]:
        return all_reduce(values, world=self._world)


class Mean(_Metric):
    """The mean of a loss, or of anything else, over all samples of all ranks.

    Args:
        world: The ranks; default those of ``mpiddl.init()``.
    """

    def reset(self) -> None:
        super().reset()
        self._sum_here: float | torch.Tensor = 0.0
        self._count = 0

    def update(self, value: float | torch.Tensor, count: int) -> None:
        """Count ``count`` samples whose mean is ``value``.

        Args:
            value: A number, or a tensor with one element; a GPU is not waited for.
            count: Samples. With 0 ``value``, which is then often NaN, does not matter.

        Raises:
            DataError: Not one number, or a negative count.
        """
        count = operator.index(count)
        if count < 0:
            raise DataError(f"count must not be negative, got {count}")
        if count == 0:
            return
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                shape = tuple(value.shape)
                raise DataError(f"one number was expected, not shape {shape}: pass values.mean()")
            value = value.detach().reshape(()).double()
        self._sum_here = self._sum_here + value * count
        self._count += count

    def compute(self) -> float:
        """The mean. Collective. Raises DataError on every rank if there are no samples."""
        total = self._total(self._count)
        return float(self._sum(numpy.array([float(self._sum_here)]))[0]) / total


class Accuracy(_Metric):
    """The part of all samples, over all ranks, whose true class is among the predicted ones.

    Args:
        world: The ranks; default those of ``mpiddl.init()``.
        top_k: The true class must be among the ``top_k`` of highest score. Of equal scores that of
            the smaller class is the higher one.

    Raises:
        DataError: ``top_k`` is not positive.
    """

    @checks_world
    def __init__(self, world: World | None = None, *, top_k: int = 1) -> None:
        if top_k < 1:
            raise DataError(f"top_k must be positive, got {top_k}")
        self.top_k = top_k
        super().__init__(world)

    def reset(self) -> None:
        super().reset()
        self._correct = self._count = 0

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Args:
            scores: Of each class, ``(n, classes)``; or, for ``top_k=1``, predicted classes,
                ``(n,)``.
            labels: The true classes, ``(n,)``.
        """
        scores, labels = _checked(scores, labels)
        if not len(labels):
            return
        if scores.dim() == 1:
            if self.top_k > 1:
                raise DataError(f"top_k={self.top_k} needs scores of shape (n, classes)")
            correct = scores == labels
        else:
            if self._refuses(_outside(labels, scores.shape[1], "label") or _nan_in(scores)):
                return
            own = scores.gather(1, labels[:, None])
            classes = torch.arange(scores.shape[1], device=scores.device)
            better = (scores > own) | ((scores == own) & (classes < labels[:, None]))
            correct = better.sum(1) < self.top_k
        self._correct += int(correct.sum())
        self._count += len(labels)

    def compute(self) -> float:
        """Between 0 and 1. Collective; raises DataError as all metrics do."""
        total = self._total(self._count)
        return int(self._sum(numpy.array([self._correct]))[0]) / total


class ConfusionMatrix(_Metric):
    """How many samples of each class, over all ranks, were taken for each class.

    Args:
        num_classes: Classes are 0 to ``num_classes - 1``.
        world: The ranks; default those of ``mpiddl.init()``.

    Raises:
        DataError: ``num_classes`` is not positive.
    """

    @checks_world
    def __init__(self, num_classes: int, world: World | None = None) -> None:
        if num_classes < 1:
            raise DataError(f"num_classes must be positive, got {num_classes}")
        self.num_classes = num_classes
        super().__init__(world)

    def reset(self) -> None:
        super().reset()
        self._matrix = numpy.zeros((self.num_classes, self.num_classes), dtype=numpy.int64)

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Args:
            scores: Of each class, ``(n, num_classes)``, the highest of which is the prediction;
                or predicted classes, ``(n,)``.
            labels: The true classes, ``(n,)``.
        """
        scores, labels = _checked(scores, labels)
        if not len(labels):
            return
        problem = _outside(labels, self.num_classes, "label")
        if scores.dim() == 2:
            if scores.shape[1] != self.num_classes:
                raise DataError(f"scores of {scores.shape[1]} classes, not of {self.num_classes}")
            problem = problem or _nan_in(scores)
            scores = scores.argmax(1)
        if self._refuses(problem or _outside(scores, self.num_classes, "prediction")):
            return
        cells = (labels * self.num_classes + scores).cpu().numpy()
        counts = numpy.bincount(cells, minlength=self.num_classes**2)
        self._matrix += counts.reshape(self._matrix.shape)

    def compute(self) -> torch.Tensor:
        """Counts, int64, on the host. Shape: (true class, predicted class). Collective."""
        self._total(int(self._matrix.sum()))
        return torch.from_numpy(self._sum(self._matrix.copy()))


class AUC(_Metric):
    """The area under the ROC curve of two classes, over all samples of all ranks.

    That is the probability that a random sample of class 1 has a higher score than one of class 0;
    a tie is half of it. Exact, so that all scores must be held and, in ``compute``, gathered on
    every rank: 9 bytes for each sample.

    Args:
        world: The ranks; default those of ``mpiddl.init()``.

    Source:
        Hanley & McNeil, Radiology 143(1), 1982: it is the Mann-Whitney statistic.
    """

    def reset(self) -> None:
        super().reset()
        self._scores = [torch.empty(0, dtype=torch.float64, device="cpu")]
        self._labels = [torch.empty(0, dtype=torch.bool, device="cpu")]

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Args:
            scores: The higher, the more like class 1; ``(n,)``.
            labels: 0 or 1, ``(n,)``.
        """
        scores, labels = _checked(scores, labels, of_each_class=False)
        if self._refuses(_outside(labels, 2, "label") or _nan_in(scores)):
            return
        self._scores.append(scores.to("cpu", torch.float64, copy=True))
        self._labels.append(labels.to("cpu", torch.bool, copy=True))

    def compute(self) -> float:
        """Between 0 and 1. Collective. Raises DataError, too, if a class has no samples."""
        total = self._total(sum(map(len, self._scores)))
        scores, labels = (
            torch.cat(gather_tensors(torch.cat(held), self._world)).numpy()
            for held in (self._scores, self._labels)
        )
        ones = int(labels.sum())
        if ones in (0, total):
            raise DataError(
                f"all {total} samples are of class {min(ones, 1)}: an AUC needs both classes",
                on_every_rank=True,
            )
        _, places, counts = numpy.unique(scores, return_inverse=True, return_counts=True)
        # Equal scores share the middle of their ranks; twice that is a whole number.
        doubled_ranks = 2 * numpy.cumsum(counts) - counts + 1
        doubled = int(doubled_ranks[places[labels]].sum()) - ones * (ones + 1)
        return doubled / (2 * ones * (total - ones))


def _checked(
    scores: torch.Tensor, labels: torch.Tensor, of_each_class: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both on one device, labels and predicted classes as int64.

    Raises:
        DataError: Shapes or dtypes do not fit.
    """
    scores = torch.as_tensor(scores).detach()
    labels = torch.as_tensor(labels).detach().to(scores.device)
    if not labels.numel() and not scores.numel():
        return scores.reshape(0), labels.reshape(0)
    shapes = f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)}"
    if labels.dim() != 1 or scores.dim() not in ((1, 2) if of_each_class else (1,)):
        wanted = "(n, classes) or (n,)" if of_each_class else "(n,)"
        raise DataError(f"{shapes} have wrong shapes: pass {wanted}, and (n,)")
    if len(scores) != len(labels):
        raise DataError(f"{shapes} are of different numbers of samples")
    classes = [labels] if scores.dim() == 2 or not of_each_class else [labels, scores]
    if any(tensor.is_floating_point() or tensor.is_complex() for tensor in classes):
        raise DataError(
            f"classes must be integers, got labels of {labels.dtype} and scores of {scores.dtype}; "
            "scores have the shape (n, classes)"
        )
    return (scores if len(classes) == 1 else scores.long()), labels.long()


def _outside(classes: torch.Tensor, num_classes: int, what: str) -> str | None:
    bad = classes[(classes < 0) | (classes >= num_classes)]
    return f"{what} {int(bad[0])} is none of classes 0 to {num_classes - 1}" if len(bad) else None


def _nan_in(scores: torch.Tensor) -> str | None:
    number = int(scores.isnan().sum())
    return f"{number} of {scores.numel()} scores of a batch are NaN" if number else None
