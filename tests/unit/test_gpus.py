"""Which GPU belongs to a rank, as far as that needs no GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from mpiddl.comm import gpus
from mpiddl.comm.gpus import choose_device, identity, report, sharing
from mpiddl.comm.layout import Layout
from mpiddl.devices.registry import device_of
from mpiddl.errors import UnsupportedBufferError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def layout(*nodes):
    firsts = tuple(ranks[0] for ranks in nodes)
    return Layout(0, 0, len(nodes[0]), 0, len(nodes), 1, 1, False, nodes, firsts)


@NO_GPU
def test_without_a_gpu_tensors_belong_on_the_host():
    assert choose_device(None, 3) == "cpu"
    assert choose_device("cpu", None) == "cpu"
    assert choose_device(torch.device("cpu"), 0) == "cpu"
    assert identity("cpu") is None


@NO_GPU
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_a_gpu_that_is_not_there_is_an_error_that_says_why(wanted):
    with pytest.raises(ValueError, match=r"torch sees 0 GPUs; (this torch was|look at)"):
        choose_device(wanted, 0)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="none of 'cpu', 'cuda', 'cuda:N'"):
        choose_device("mps", 0)
    with pytest.raises(UnsupportedBufferError, match="NVIDIA GPUs are supported"):
        device_of(torch.empty(1, device="meta"))


def test_the_rank_counts_round_the_visible_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpus, "use_gpu", chosen.append)
    names = [choose_device("cuda", local_rank) for local_rank in (0, 1, 2, 3, None)]
    assert names == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert choose_device("cuda:1", 0) == "cuda:1"
    assert chosen == [0, 1, 0, 1, 0, 1]


def test_a_gpu_in_use_has_a_context(monkeypatch):
    """set_device alone makes none where the GPU is the present one."""
    asked = []
    stream = SimpleNamespace(synchronize=lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: asked.append(index) or stream)
    gpus.use_gpu(1)
    assert asked == [1, 1, "synchronize"]


def test_sharing_is_counted_within_a_node():
    two = layout((0, 1), (2, 3))
    assert sharing(["a", "b", "a", "b"], two) == 1  # the same names on another node
    assert sharing(["a", "a", "a", "b"], two) == 2
    assert sharing(["a", None, "a", "a"], layout((0, 1, 2, 3))) == 3
    assert sharing([None] * 4, two) == 0


def test_sharing_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, logger="mpiddl"):
        report(1, 0)
        report(2, 1)
        assert not caplog.text
        report(2, 0)
    assert "up to 2 ranks share a GPU" in caplog.text
