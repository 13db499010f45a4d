"""replicas.check names the rank and the parameter that differ, down to one bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpiddl
from mpiddl.errors import ReplicaError


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "2.bias"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_one_bit_on_one_rank_is_found(world, agree, name, wrapped):
    model = make()
    if wrapped:
        model = mpiddl.DataParallel(model)
    mpiddl.replicas.check(model)

    odd = world.size // 2
    if world.rank == odd:
        tensor = model.state_dict()[name].view(-1)
        tensor[:1].view(torch.int32).bitwise_xor_(1)
    try:
        mpiddl.replicas.check(model, buffers=True)
    except ReplicaError as error:
        message = str(error)
    else:
        message = ""

    if world.size == 1:
        agree(message == "", message)
    elif world.size == 2:  # which of two is wrong cannot be told; rank 0 is taken as right
        agree(repr(name) in message and "rank 1" in message, message)
    else:
        agree(repr(name) in message and f"rank {odd} is" in message, message)


def test_negative_zero_is_another_bit_pattern(world, agree):
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    if world.rank == world.size - 1 and world.size > 1:
        model.bias.data.neg_()
    try:
        mpiddl.replicas.check(model, buffers=True)
    except ReplicaError as error:
        agree("'bias'" in str(error))
    else:
        agree(world.size == 1, "not found")


def test_buffers_are_each_ranks_own_unless_asked_for(world, agree):
    model = make()
    model[1].running_mean.fill_(world.rank)

    mpiddl.replicas.check(model)
    if world.size > 1:
        with pytest.raises(ReplicaError, match="'1.running_mean'"):
            mpiddl.replicas.check(model, buffers=True)
    agree(True)


def test_another_order_in_memory_is_a_difference(world, agree):
    convolution = nn.Conv2d(2, 2, 2)
    nn.init.ones_(convolution.weight)
    nn.init.ones_(convolution.bias)
    if world.rank == world.size - 1 and world.size > 1:
        convolution.to(memory_format=torch.channels_last)
    try:
        mpiddl.replicas.check(convolution)
    except ReplicaError as error:
        agree("'weight'" in str(error))
    else:
        agree(world.size == 1, "not found")
