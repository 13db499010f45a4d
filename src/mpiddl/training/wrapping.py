"""What happens once, when a model is wrapped: checks, agreement between ranks, hooks."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from mpiddl.buckets import agreement
from mpiddl.buckets.gradients import spec_of
from mpiddl.buckets.plan import BucketPlan
from mpiddl.collectives.reduction import FLOATS
from mpiddl.devices.registry import device_of
from mpiddl.errors import GradientError, UnsupportedBufferError
from mpiddl.events import Kind, describe, record
from mpiddl.overlap.control import Control
from mpiddl.training.state import named_state

__all__ = ["agree_on_plan", "attach", "describe_plan", "detach", "trained_parameters"]


class _Wrapper(Protocol):
    """What a hook needs of the wrapper."""

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None: ...


_hooks: dict[int, tuple[weakref.ReferenceType[Any], Any]] = {}
"""By a parameter's identity: its wrapper and the hook. A living wrapper keeps its parameters."""


def trained_parameters(
    module: torch.nn.Module, wrapper: _Wrapper
) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that require a gradient, each once, in the model's order.

    Raises:
        ValueError: There is none, or one is wrapped already.
        UnsupportedBufferError: One cannot be reduced.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient: nothing to reduce"
        )
    first, place = named[0][0], named[0][1].device
    for name, tensor in named_state(module):
        if tensor.device != place:
            raise UnsupportedBufferError(
                f"{name!r} is on {tensor.device}, but {first!r} on {place}; move the whole model "
                "to one device, model.to(world.device)"
            )
    try:
        device_of(named[0][1])
    except UnsupportedBufferError as error:
        raise UnsupportedBufferError(f"{first!r} is {error}") from None
    for name, parameter in named:
        _check_parameter(name, parameter, wrapper)
    return named


def _check_parameter(name: str, parameter: torch.nn.Parameter, wrapper: _Wrapper) -> None:
    other, _ = _hooks.get(id(parameter), (lambda: None, None))
    if other() not in (None, wrapper):
        raise ValueError(
            f"parameter {name!r} is wrapped in DataParallel already and would be reduced twice; "
            "wrap a model once, or unwrap() the other wrapper first"
        )
    if isinstance(parameter, torch.nn.UninitializedParameter):
        raise UnsupportedBufferError(
            f"parameter {name!r} has no shape yet; run one forward before wrapping"
        )
    if parameter.dtype not in FLOATS:
        raise UnsupportedBufferError(
            f"parameter {name!r} is {parameter.dtype}; valid are "
            + ", ".join(str(dtype) for dtype in FLOATS)
        )


def agree_on_plan(
    module: torch.nn.Module,
    plan: BucketPlan,
    algorithm: str,
    sparse: Collection[str],
    control: Control,
) -> None:
    """Stop on every rank if they wrap different models. Collective.

    Raises:
        MismatchError: Names the first parameter, buffer or bucket that differs.
    """
    state = [spec_of(name, tensor) for name, tensor in named_state(module)]
    lines = agreement.describe(plan, state, algorithm, sparse)
    digests = control.gather_json(agreement.digest(lines))
    if any(theirs != digests[0] for theirs in digests):  # only then send them whole
        raise agreement.first_difference(control.gather_json(lines))


def describe_plan(model: int, plan: BucketPlan, tags: Sequence[int]) -> None:
    """Tell readers of events which parameters are in which bucket of model ``model``."""
    specs = plan.parameters
    nbytes = [bucket.length * specs[bucket.members[0]].itemsize for bucket in plan.buckets]
    buckets = [
        {"members": bucket.members, "nbytes": length, "tag": tag}
        for bucket, length, tag in zip(plan.buckets, nbytes, tags, strict=False)
    ]
    describe(model, [spec.name for spec in specs], buckets)
    record(Kind.PLAN, model, len(buckets), sum(nbytes))


def attach(
    wrapper: _Wrapper, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]
) -> None:
    """Tell ``wrapper`` of every gradient. The hooks do not keep it alive, but miss it."""
    reference = weakref.ref(wrapper)
    for member, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        detach([parameter])  # what a wrapper that is gone has left

        def hook(parameter: torch.nn.Parameter, member: int = member, name: str = name) -> None:
            alive = reference()
            if alive is None:
                raise GradientError(
                    f"the DataParallel around parameter {name!r} is gone, so its gradient would "
                    "stay on this rank. Keep the wrapper and call the model through it, or "
                    "unwrap() it to train on this rank alone"
                )
            alive.gradient_ready(member, parameter)

        handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        _hooks[id(parameter)] = (reference, handle)


def detach(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Remove the hooks of these parameters, where there are any."""
    for parameter in parameters:
        _, handle = _hooks.pop(id(parameter), (None, None))
        if handle is not None:
            handle.remove()
