"""``world`` stands at one place in all calls of ``mpiddl.data``, and nowhere else."""

from __future__ import annotations

import inspect

import pytest

import mpiddl
from mpiddl.comm.world import World

CALLS = {name: getattr(mpiddl.data, name) for name in mpiddl.data.__all__}
CALLS |= {"ShardedStream.of_files": mpiddl.data.ShardedStream.of_files}
CALLS |= {name: getattr(mpiddl, name) for name in ("ShardBatchSampler", "ShardSampler")}
WITH_WORLD = sorted(
    name for name, call in CALLS.items() if "world" in inspect.signature(call).parameters
)
WORLD = object.__new__(World)  # only its type is looked at


def parts(name):
    parameters = list(inspect.signature(CALLS[name]).parameters.values())
    place = [each.name for each in parameters].index("world")
    return parameters[:place], parameters[place], parameters[place + 1 :]


@pytest.mark.parametrize("name", WITH_WORLD)
def test_the_place(name):
    before, world, behind = parts(name)
    if not any(each.kind is each.VAR_POSITIONAL for each in before):
        assert world.kind is world.POSITIONAL_OR_KEYWORD
    assert world.default is None
    assert all(each.default is each.empty for each in before), "an option stands in front of world"
    assert all(each.kind in (each.KEYWORD_ONLY, each.VAR_KEYWORD) for each in behind)


@pytest.mark.parametrize("name", WITH_WORLD)
def test_a_world_elsewhere_is_named(name):
    before, _, behind = parts(name)
    for place, each in enumerate([*before, *behind]):
        args, kwargs = [*[None] * place, WORLD], {}
        if each.kind is each.VAR_POSITIONAL:
            args = [WORLD, None]
        elif each in behind:
            args, kwargs = [], {each.name: WORLD}
        if each.name == "group":  # torchmetrics' word for it
            continue
        with pytest.raises(TypeError, match=rf"got a World as {each.name}; .* pass world="):
            CALLS[name](*args, **kwargs)


@pytest.mark.parametrize("name", WITH_WORLD)
def test_what_is_no_world_is_named(name):
    with pytest.raises(TypeError, match=r"world must be what mpiddl.init\(\).* got int 0"):
        CALLS[name](world=0)


@pytest.mark.parametrize("name", ["split", "loader"])
def test_calls_without_other_ranks_take_none(name):
    with pytest.raises(TypeError, match="takes no world"):
        CALLS[name]([1], WORLD)


def test_the_walk_finds_them():
    assert {"scatter", "shuffle", "Accuracy", "broadcast_file", "ShardedStream"} <= {*WITH_WORLD}
