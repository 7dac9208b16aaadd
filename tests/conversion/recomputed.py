"""Models whose outputs are made again in the backward, and what of them was seen to be."""

import copy
from contextlib import contextmanager
from unittest import mock

import torch
from parts import CHANNELS, Parts
from small_networks import kernels
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import resfused

NODES, KEPT, MADE_AGAIN = 11, 10, 9
"""Of the small ResNet: nobody keeps the last output, and the shortcut of the second block of a stage is made again."""


class Seen:
    """The outputs of all fused nodes, and those that were made again."""

    def __init__(self):
        self.outputs, self.made = [], []

    @property
    def alive(self):
        return sum(not storage.expired() for storage in self.outputs)


@contextmanager
def seen():
    found = Seen()
    forward, normalise = kernels.forward, kernels.normalise

    def noted(function, storages):
        def call(*arguments):
            results = function(*arguments)
            storages.append(StorageWeakRef(results[0].untyped_storage()))
            return results

        return call

    with (
        mock.patch.object(kernels, "forward", noted(forward, found.outputs)),
        mock.patch.object(kernels, "normalise", noted(normalise, found.made)),
    ):
        yield found


def both(model, device, dtype=torch.float64):
    """The model with its outputs made again, and as it was."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    eager = model.to(device, dtype)
    again = copy.deepcopy(eager)
    resfused.fuse_(again, recompute=True)
    return again, eager


def without(model):
    """A copy that is fused, and keeps its outputs."""
    twin = copy.deepcopy(model)
    resfused.fuse_(twin)
    return twin


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]
    assert not different, different


class Shared(Parts):
    """One output for three convolutions, and for a pooling that shares nothing with their branch."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(CHANNELS, 2, 1) for _ in range(3))

    def forward(self, x):
        y = self.relu(self.a(x))
        return torch.cat([head(y) for head in self.heads], 1)
