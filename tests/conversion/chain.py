"""A fused chain of blocks whose parts tests watch and replace: where they lie, which pairs and nodes it has."""

import copy
from unittest import mock

import torch
from resfused.kernels import gpu as kernels
from small_networks import step
from torch import nn

PLACES = {
    "the model": "",
    "stage": "layer1",
    "block that gives a pair": "layer1.0",
    "block that takes a pair": "layer2.0",
    "norm": "layer1.0.bn1",
    "norm before the addition": "layer1.0.bn2",
    "norm of the projection": "layer2.0.downsample.1",
    "ReLU": "layer1.0.relu",
    "convolution": "layer1.0.conv2",
    "convolution that reads a pair": "layer2.0.conv1",
    "projection that reads a pair": "layer2.0.downsample.0",
    "whole projection": "layer2.0.downsample",
}


def pairs(model, x):
    """How many nodes of a training step were given two gradients to add."""
    with mock.patch.object(kernels, "backward", wraps=kernels.backward) as counted:
        step(model, x)
    return sum(call.args[1] is not None for call in counted.call_args_list)


def nodes(model, x):
    """How many fused nodes a training step has."""
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
        step(copy.deepcopy(model), x)
    return counted.call_count


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(4), 2

    def forward(self, x):
        return torch.relu(self.bn(x)) * self.scale


class NormFirst(nn.Module):
    """A norm of what another branch reads after it."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        out = self.bn(x)
        return torch.relu(out + self.conv(x))
