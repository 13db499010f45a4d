"""States as JSON and tensors, and back."""

from __future__ import annotations

import json
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpiddl.base.plain import decode, encode

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
keys = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.text(max_size=2))
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def there_and_back(value):
    text, tensors = encode(value, "it")
    return decode(json.loads(json.dumps(text)), tensors)


@given(values)
def test_plain_values_come_back(value):
    found = there_and_back(value)
    assert found == value
    assert repr(found) == repr(value)  # a tuple is no list, True is not 1


def test_tensors_arrays_and_counters_come_back():
    value = {
        0: torch.arange(6.0).view(2, 3).T,
        "array": numpy.arange(4, dtype=numpy.uint16),
        "scalar": numpy.float32(0.1),
        "counter": Counter({3: 1, 5: 2}),
        "none": torch.empty(0),
    }
    found = there_and_back(value)
    assert torch.equal(found[0], value[0])
    assert found["array"].dtype == numpy.uint16
    assert numpy.array_equal(found["array"], value["array"])
    assert found["scalar"] == numpy.float32(0.1)
    assert isinstance(found["scalar"], numpy.float32)
    assert found["counter"].most_common(1) == [(5, 2)]
    assert found["none"].shape == (0,)


def test_a_tensor_that_occurs_twice_is_there_once():
    weight = torch.ones(3)
    _, tensors = encode([weight, torch.nn.Parameter(weight), weight[:2], torch.ones(3)], "it")
    assert [len(tensor) for tensor in tensors] == [3, 2, 3]


@pytest.mark.parametrize("value", [object(), {1, 2}, [print], numpy.array(["text"])], ids=repr)
def test_other_things_are_refused_with_their_place(value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\].* is a "):
        encode({"a": [0, value]}, "state")


@pytest.mark.parametrize("text", [{"set": []}, {"tensor": 7}, {}, {"a": 1, "b": 2}])
def test_what_was_not_encoded_is_refused(text):
    with pytest.raises((ValueError, LookupError, TypeError)):
        decode(text, [])
