"""Batch normalisation over the batches of all ranks together."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from mpiddl.base.log import logger
from mpiddl.comm.world import World, current_world
from mpiddl.training.normalisation import normalise

__all__ = ["SyncBatchNorm", "adopt_batch_norms"]


class _Wrapper(Protocol):
    """What a layer asks the DataParallel around it."""

    world: World

    @property
    def share(self) -> int:
        """This rank's samples inside ``model.batch()``, else 1."""


class SyncBatchNorm(_BatchNorm):
    """``BatchNorm1d``, ``2d`` or ``3d`` whose statistics are those of the global batch.

    In training every rank calls forward, and then backward, as often as the others: each is one
    small collective. A rank without samples calls both on a batch of zero rows. In eval mode
    nothing is sent.

    Batches may have different lengths: every value counts once. Inside ``model.batch()``, losses
    count by their samples, so that results are those of one rank with the global batch.

    Args:
        num_features: Channels.
        eps: Added to the variance.
        momentum: Of the running statistics; None: their plain mean.
        affine: Learn a weight and a bias.
        track_running_stats: Keep the statistics that eval mode uses.
        world: The ranks; default those of ``mpiddl.init()``.
        device: Of the parameters and buffers.
        dtype: Of the parameters and buffers.

    Shape:
        ``(N, C, ...)`` in and out. 16-bit inputs are computed with in float32.

    Source:
        Ioffe and Szegedy, ICML 2015; Chan et al., "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", 1979.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        world: World | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.world = world

    @classmethod
    def convert(cls, module: torch.nn.Module, world: World | None = None) -> torch.nn.Module:
        """Replace every batch normalisation in ``module`` by one over all ranks.

        ``torch.nn.SyncBatchNorm`` is replaced, too. Parameters and buffers stay the same
        tensors, so an optimizer may exist already. To be called before ``DataParallel``.

        Args:
            module: Changed in place.
            world: The ranks; default those of ``mpiddl.init()``.

        Returns:
            ``module``, or its replacement where it is a batch normalisation itself.

        Raises:
            ValueError: A lazy layer has no shape yet.
        """
        replacements: dict[int, torch.nn.Module] = {}  # a layer may be in several places
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, cls):
                replacements[id(layer)] = cls._replacement(name, layer, world)
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if id(child) in replacements:
                    parent._modules[name] = replacements[id(child)]
        return replacements.get(id(module), module)

    @classmethod
    def _replacement(cls, name: str, layer: _BatchNorm, world: World | None) -> torch.nn.Module:
        if not isinstance(layer, torch.nn.SyncBatchNorm):
            if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
                raise ValueError(f"layer {name!r} has no shape yet; run one forward first")
            if type(layer).forward is not _BatchNorm.forward:
                logger.warning(
                    "layer %r, a %s, has a forward of its own and stays as it is",
                    name,
                    type(layer).__name__,
                )
                return layer
        new = cls(
            layer.num_features,
            layer.eps,
            layer.momentum,
            affine=False,
            track_running_stats=False,
            world=world,
        )
        new.affine, new.track_running_stats = layer.affine, layer.track_running_stats
        new._parameters, new._buffers = layer._parameters, layer._buffers
        return new.train(layer.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm({self.num_features}) got an input of shape {tuple(input.shape)}; "
                f"expected (N, {self.num_features}, ...)"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        if self.training:
            return normalise(input, self)  # type: ignore[no-any-return]
        tracked = self.running_mean is not None
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            not tracked,
            0.0,
            self.eps,
        )

    def ranks(self) -> World:
        """The ranks whose batches are one."""
        return self.world or current_world()

    def share(self) -> int:
        """What this rank's loss weighs, in relation to other ranks'."""
        wrapper = _wrappers.get(self, _nobody)()
        return 1 if wrapper is None else wrapper.share

    def update_running_statistics(
        self, count: float, mean: torch.Tensor, variance: torch.Tensor
    ) -> None:
        """Add those of a global batch, as torch's layers do."""
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert self.num_batches_tracked is not None
            momentum = 1 / int(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


# Which DataParallel a layer is in. Not an attribute: layers are copied and saved.
_wrappers: weakref.WeakKeyDictionary[SyncBatchNorm, weakref.ReferenceType[Any]] = (
    weakref.WeakKeyDictionary()
)


def _nobody() -> None:
    return None


def adopt_batch_norms(wrapper: _Wrapper, module: torch.nn.Module) -> None:
    """Let the layers of a model know the DataParallel around it.

    Raises:
        ValueError: A layer is ``torch.nn.SyncBatchNorm``, or belongs to other ranks.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.SyncBatchNorm):
            raise ValueError(
                f"layer {name!r} is torch.nn.SyncBatchNorm, which needs torch.distributed; "
                "convert before wrapping: model = mpiddl.SyncBatchNorm.convert(model)"
            )
        if isinstance(layer, SyncBatchNorm):
            if layer.world is None and wrapper.world is not current_world():
                raise ValueError(
                    f"layer {name!r} takes its statistics over all ranks, but the model is on "
                    "a group: mpiddl.SyncBatchNorm.convert(model, world=group)"
                )
            _wrappers[layer] = weakref.ref(wrapper)
