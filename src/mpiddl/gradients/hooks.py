"""Hooks in parameters and optimizers: the wrapper of a model hears of its gradients and steps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpiddl.collectives.reduction import FLOATS
from mpiddl.devices.registry import device_of
from mpiddl.errors import GradientError, UnsupportedBufferError
from mpiddl.gradients.state import named_state, why_not_plain

__all__ = [
    "NotWrapped",
    "attach",
    "detach",
    "trained_parameters",
    "watch_steps",
    "watched_parameters",
    "wrapper_of",
]


class _Wrapper(Protocol):
    """The methods that hooks call."""

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None:
        """Autograd has finished the gradient of ``parameter``."""


class _Hooked(NamedTuple):
    """A hook in a parameter. A living wrapper keeps its parameters alive.

    Attributes:
        wrapper: The wrapper that hears of the gradients.
        handle: Removes the hook.
        reduces: Whether the wrapper reduces the gradients, or only watches a frozen parameter.
    """

    wrapper: weakref.ReferenceType[Any]
    handle: Any
    reduces: bool


_hooks: dict[int, _Hooked] = {}
"""All hooks of this process, by the identity of the parameter."""


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


def attach(
    wrapper: _Wrapper,
    names: Sequence[str],
    parameters: Sequence[torch.nn.Parameter],
    num_reduced: int,
) -> None:
    """Call ``wrapper.gradient_ready`` for every gradient.

    The hooks hold a weak reference to the wrapper, and raise an error once it is gone.

    Args:
        wrapper: The wrapper that is called.
        names: Names of these parameters.
        parameters: Parameters whose gradients the wrapper reduces, then frozen ones that it only
            watches: a parameter may be unfrozen at any time before a backward.
        num_reduced: Number of parameters whose gradients are reduced.
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
    """The wrapper that reduces the gradients of ``parameter``; None if there is none."""
    hooked = _hooks.get(id(parameter))
    return hooked.wrapper() if hooked is not None and hooked.reduces else None


class NotWrapped:
    """Refuses the gradients of a copy of a model that is evaluated and was not wrapped yet.

    Args:
        module: That copy.
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


@functools.cache
def watch_steps() -> None:
    """Call from now on ``step_begins(optimizer, in_backward)`` of the wrappers whose parameters an
    optimizer of torch's is about to step, in this whole process.

    So steps of gradients that no rank has reduced are found.
    """
    register_optimizer_step_pre_hook(_step_begins)


def _step_begins(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a step that is compiled: what it is called from is not seen here
    in_backward = torch._C._current_graph_task_id() != -1
    for wrapper in _wrappers_of(optimizer, every_parameter=in_backward):
        wrapper.step_begins(optimizer, in_backward)


def _wrappers_of(optimizer: torch.optim.Optimizer, every_parameter: bool) -> Iterator[Any]:
    """The wrappers of its parameters, or of the first in each group alone, which costs nothing."""
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"] if every_parameter else group["params"][:1]:
            wrapper = wrapper_of(parameter)
            if wrapper is not None and id(wrapper) not in seen:
                seen.add(id(wrapper))
                yield wrapper
