"""Reads checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpiddl.api.broadcast import broadcast
from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import broadcast_json
from mpiddl.base.compiled_names import in_names_of
from mpiddl.base.log import logger
from mpiddl.base.plain import decode
from mpiddl.base.segments import chunked
from mpiddl.checkpoint.generators import from_text, set_random_state
from mpiddl.checkpoint.index import RANDOM
from mpiddl.checkpoint.opening import Found, open_together
from mpiddl.checkpoint.own import PARTS, in_turn, name_of, parts_of, receive, send
from mpiddl.checkpoint.places import Places, keep_bits, places_in_model, places_in_optimizer
from mpiddl.checkpoint.tensors import PIECE_BYTES, Kind
from mpiddl.collectives.channel import Channel, bytes_of
from mpiddl.comm.tuning import Choice
from mpiddl.comm.world import World, current_world
from mpiddl.devices.base import Buffer
from mpiddl.errors import CheckpointError

__all__ = ["Checkpoint", "load"]


class Checkpoint(NamedTuple):
    """What was loaded.

    Attributes:
        step: At which it was saved.
        path: Its folder.
        values: The plain values that were saved, by name, and the states of parts that were asked
            for with something that has no ``load_state_dict``, None say.
        same_ranks: Whether as many ranks, on as many nodes, wrote it: random generators and
            choices made by measuring were restored.
    """

    step: int
    path: Path
    values: dict[str, Any]
    same_ranks: bool


def load(folder: str | Path, *, world: World | None = None, **parts: Any) -> Checkpoint | None:
    """Load the newest whole checkpoint into ``parts``. Collective.

    Rank 0 reads and checks it; the others get it as messages, so only rank 0's node needs to see
    the folder. Nothing is unpickled. Tensors arrive in pieces, right where they are needed: in the
    model's own memory, and where an optimizer wants its state. On as many ranks as wrote it each
    gets what was its own; on as many nodes, too, every rank goes on with its random numbers, and
    what was found out by measuring counts again, instead of being measured anew.

    Args:
        folder: As ``save`` was given, or one checkpoint in it.
        world: The ranks; default those of ``mpiddl.init()``.
        parts: As ``save`` was given: what has a ``load_state_dict()`` is loaded. Of another part,
            None say, the value is returned. Of a part that is left out nothing is read, if it had a
            ``state_dict()``.

    Returns:
        None, on every rank, if there is no checkpoint.

    Raises:
        CheckpointError: On every rank: it is of another job (a part is missing, or does not fit),
            or the one that was named is broken.
    """
    world = world or current_world()
    found = open_together(Path(folder), world)
    if found is None:
        return None
    index = found.index
    same = index.nodes == [list(ranks) for ranks in world.layout.nodes]
    if world.rank == 0:
        _tell_what_is_lost(found, same, world)
    _refuse_others(found, parts, world)
    wanted = _wanted(found, parts, same, world)
    kinds = found.kinds_of(world.rank)
    places = {name: Places(kinds, found.strides_of(world.rank)) for name in wanted}
    here: dict[str | None, Any] = {
        name: part.state_dict() for name, part in parts.items() if isinstance(part, torch.nn.Module)
    }

    def states() -> dict[str | None, Any]:
        decoded = {name: decode(encoded, places[name]) for name, encoded in wanted.items()}
        named = {name: in_names_of(model, decoded[name]) for name, model in here.items()}
        return {**decoded, **named}

    with _together(found.path, world):
        made = states()  # not filled yet
        for name, part in parts.items():
            if name in here:
                _refuse_other_model(found.path, name, made[name], here[name])
                places[name].replace(places_in_model(made[name], here[name]))
            else:
                places[name].replace(places_in_optimizer(part, made[name]))
    _fill(found, places, world)
    with _together(found.path, world):
        filled = states()
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                state = filled.pop(name)
                part.load_state_dict(state)
                keep_bits(part, state)
    if same:
        old = index.random
        set_random_state(
            filled.pop(RANDOM) if old is None else from_text(old[world.rank]), world.device
        )
        _adopt(index.choices, parts, world)
    values = {name: state for name, state in filled.items() if name is not None}
    return Checkpoint(index.step, found.path, values, same)


def _tell_what_is_lost(found: Found, same: bool, world: World) -> None:
    nodes = found.index.nodes
    if not same:
        logger.info(
            "%s was written by %d ranks on %d nodes: random numbers begin anew",
            found.path,
            sum(map(len, nodes)),
            len(nodes),
        )
    if found.has_own and not found.own and world.rank == 0:
        logger.info("%s: what was each rank's own is rank 0's on all ranks now", found.path)


def _refuse_others(found: Found, parts: dict[str, Any], world: World) -> None:
    """Before anything is changed: a part that is missing, or that not all ranks ask for."""
    problem = None
    stored = [name for name, _ in found.index.parts["dict"]]
    everyones = broadcast_json(list(parts), world=world)
    if set(everyones) != set(parts):
        problem = f"asks for {sorted(parts)}, rank 0 for {sorted(everyones)}: all must ask alike"
    for name in parts:
        if name not in stored:
            names = ", ".join(name for name in stored if name is not RANDOM)
            problem = f"{found.path} has no {name!r}, only {names or 'nothing'}"
    raise_together(problem, world, CheckpointError)


def _wanted(found: Found, parts: dict[str, Any], same: bool, world: World) -> dict[str | None, Any]:
    """This rank's states as JSON, by name: those that are asked for, and plain values."""
    received = [found.index.parts]

    def pass_on(owner: int, name: str, kind: Kind, channel: Channel) -> None:
        text = torch.empty(tuple(kind.shape), dtype=torch.uint8, device="cpu")
        if world.rank == 0:
            found.read(name, text)
            send(text, owner, channel)
        else:
            receive(text, 0, channel)
            received.append(parts_of(text))

    in_turn(world, [(n, k) for n, k in found.own.items() if n.endswith(PARTS)], pass_on)
    found.raise_problem(world)
    states: dict[str | None, Any] = dict(map(tuple, received[-1]["dict"]))
    plain = found.index.plain
    return {
        name: state
        for name, state in states.items()
        if (same if name is RANDOM else name in parts or plain is None or name in plain)
    }


def _fill(found: Found, places: dict[str | None, Places], world: World) -> None:
    """Rank 0 reads each tensor and passes it on, a piece at a time. Collective."""

    def targets_of(number: int) -> list[torch.Tensor]:
        return [of_part[number] for of_part in places.values() if number in of_part]

    # All ranks have the same states and ask for the same parts, or some of them may want any.
    may_differ = any(name.endswith(PARTS) for name in found.own)
    for number, kind in sorted(found.shared.items()):
        if not (may_differ or targets_of(number)):
            continue
        is_own = name_of(world.rank, number) in found.own
        with _wire(kind, [] if is_own else targets_of(number)) as wire:
            for part in chunked(slice(0, len(wire)), PIECE_BYTES):
                if world.rank == 0:
                    found.read(number, wire[part], part.start)
                broadcast(wire[part], world=world)

    def pass_on(owner: int, name: str, kind: Kind, channel: Channel) -> None:
        with _wire(kind, targets_of(int(name.partition(".")[2])) if world.rank else []) as wire:
            if world.rank == 0:
                found.read(name, wire)
                send(wire, owner, channel)
            else:
                receive(wire, 0, channel)

    in_turn(world, [(n, k) for n, k in found.own.items() if not n.endswith(PARTS)], pass_on)
    found.raise_problem(world)


@contextmanager
def _wire(kind: Kind, targets: list[torch.Tensor]) -> Iterator[Buffer]:
    """Bytes on the host in the order of dimensions; afterwards all ``targets`` have them."""
    ready = [t for t in targets if t.device.type == "cpu" and t.is_contiguous()]
    whole = ready[0] if ready else torch.empty(tuple(kind.shape), dtype=kind.dtype, device="cpu")
    yield bytes_of(whole)
    with torch.no_grad():
        for target in targets:
            if target is not whole:
                target.copy_(whole)


@contextmanager
def _together(path: Path, world: World) -> Iterator[None]:
    """What goes wrong here on one rank is an error on all."""
    problem = None
    try:
        yield
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # whatever a part makes of a state that is another's
        problem = f"{path} does not fit this job: {error}"
    raise_together(problem, world, CheckpointError)


def _refuse_other_model(
    path: Path, name: str, stored: dict[str, Any], here: dict[str, Any]
) -> None:
    for key in [*stored, *here]:
        if key not in here or key not in stored:
            has, lacks = (
                ("the checkpoint", "this model")
                if key in stored
                else (
                    "this model",
                    "the checkpoint",
                )
            )
            raise CheckpointError(f"{path} is of another {name}: {has} has {key!r}, {lacks} not")
        one, other = stored[key], here[key]
        if isinstance(one, torch.Tensor) and (one.shape, one.dtype) != (other.shape, other.dtype):
            raise CheckpointError(
                f"{path} is of another {name}: {key!r} is {_words(one)} in the checkpoint, "
                f"{_words(other)} in this model"
            )


def _words(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _adopt(choices: dict[str, Any], parts: dict[str, Any], world: World) -> None:
    world.tuned = [Choice(*choice) for choice in choices.get("tuned", [])]
    for name, part in parts.items():
        if name in choices and hasattr(part, "adopt_choices"):
            part.adopt_choices(choices[name])
