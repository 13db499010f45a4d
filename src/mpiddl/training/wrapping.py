"""What happens once, when a model is wrapped: checks, agreement between ranks, hooks."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from mpiddl.collectives.reduction import FLOATS
from mpiddl.devices.registry import device_of
from mpiddl.engine.control import Control
from mpiddl.errors import GradientError, UnsupportedBufferError
from mpiddl.gradients import agreement
from mpiddl.gradients.arena import spec_of
from mpiddl.gradients.plan import BucketPlan
from mpiddl.observe.events import Kind, describe, record
from mpiddl.training.state import named_state, why_not_plain

__all__ = [
    "NotWrapped",
    "agree_on_plan",
    "attach",
    "describe_plan",
    "detach",
    "trained_parameters",
    "watched_parameters",
    "wrapper_of",
]


class _Wrapper(Protocol):
    """What a hook needs of the wrapper."""

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None: ...


class _Hooked(NamedTuple):
    """Of a parameter. A living wrapper keeps its parameters.

    Attributes:
        wrapper: Who is told of its gradients.
        handle: The hook.
        reduces: Whether the wrapper reduces them, or only watches a frozen parameter.
    """

    wrapper: weakref.ReferenceType[Any]
    handle: Any
    reduces: bool


_hooks: dict[int, _Hooked] = {}
"""By a parameter's identity."""


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
        reason = why_not_plain(tensor)
        if reason is not None:
            raise UnsupportedBufferError(
                f"{name!r} is {reason.problem}, which ranks cannot exchange: {reason.way_out}"
            )
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
    hooked = _hooks.get(id(parameter))
    if hooked is not None and hooked.reduces and hooked.wrapper() not in (None, wrapper):
        raise ValueError(
            f"parameter {name!r} is wrapped in DataParallel already and would be reduced twice; "
            "wrap a model once, or unwrap() the other wrapper first"
        )
    if parameter.dtype not in FLOATS:
        way_out = (
            ". Keep it as a real parameter, torch.view_as_real(weight), and use "
            "torch.view_as_complex(parameter) in forward"
            if parameter.is_complex()
            else ". Freeze it, requires_grad_(False), or keep it in one of those"
        )
        raise UnsupportedBufferError(
            f"parameter {name!r} is {parameter.dtype}; valid are "
            + ", ".join(str(dtype) for dtype in FLOATS)
            + way_out
        )


def watched_parameters(
    module: torch.nn.Module, wrapper: _Wrapper
) -> list[tuple[str, torch.nn.Parameter]]:
    """Frozen parameters whose gradients ``wrapper`` must hear of, should they be unfrozen."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
        and (parameter.is_floating_point() or parameter.is_complex())
        and not isinstance(parameter, torch.nn.UninitializedParameter)
        and not parameter.is_inference()
        and (id(parameter) not in _hooks or _hooks[id(parameter)].wrapper() in (None, wrapper))
    ]


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
    wrapper: _Wrapper,
    names: Sequence[str],
    parameters: Sequence[torch.nn.Parameter],
    num_reduced: int,
) -> None:
    """Tell ``wrapper`` of every gradient. The hooks do not keep it alive, but miss it.

    Args:
        wrapper: Who is told.
        names: Of the parameters.
        parameters: Those whose gradients it reduces, then frozen ones that it only watches: a
            parameter may be unfrozen at any time before a backward.
        num_reduced: How many are reduced.
    """
    reference = weakref.ref(wrapper)
    for member, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        _remove(parameter)  # what a wrapper that is gone has left, or one that watches
        reduces = member < num_reduced

        def hook(
            parameter: torch.nn.Parameter,
            member: int = member,
            name: str = name,
            reduces: bool = reduces,
        ) -> None:
            alive = reference()
            if alive is not None:
                alive.gradient_ready(member, parameter)
            elif reduces:
                raise GradientError(
                    f"the DataParallel around parameter {name!r} is gone, so its gradient would "
                    "stay on this rank. Keep the wrapper and call the model through it, or "
                    "unwrap() it to train on this rank alone"
                )

        frozen = not parameter.requires_grad
        if frozen:  # torch takes hooks of trained parameters only, but keeps them
            parameter.requires_grad_(True)
        handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        if frozen:
            parameter.requires_grad_(False)
        _hooks[id(parameter)] = _Hooked(reference, handle, reduces)


def wrapper_of(parameter: torch.Tensor) -> Any:
    """Who reduces the gradients of ``parameter``; None if nobody does."""
    hooked = _hooks.get(id(parameter))
    return hooked.wrapper() if hooked is not None and hooked.reduces else None


class NotWrapped:
    """Refuses the gradients of a copy of a model that is evaluated and was not wrapped yet.

    Args:
        module: The copy.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        attach(self, self._names, [parameter for _, parameter in named], 0)

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None:
        """Raise GradientError."""
        raise GradientError(
            f"parameter {self._names[member]!r} of a copy got a gradient, which would stay on "
            "this rank: a copy of a DataParallel is wrapped in its first forward in training, on "
            "every rank together. Call copy.train() before that one; or freeze a copy that is "
            "not trained, copy.requires_grad_(False)"
        )


def detach(wrapper: _Wrapper, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Remove the hooks of ``wrapper`` from these parameters, where there are any."""
    for parameter in parameters:
        if id(parameter) in _hooks and _hooks[id(parameter)].wrapper() is wrapper:
            _remove(parameter)


def _remove(parameter: torch.nn.Parameter) -> None:
    hooked = _hooks.pop(id(parameter), None)
    if hooked is not None:
        hooked.handle.remove()
