"""Outputs that are made again in the backward: the same numbers, less memory, and what is told of it."""

import copy
import gc
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from oracle import assert_close
from parts import CHANNELS, Parts
from recomputed import KEPT, MADE_AGAIN, NODES, Shared, assert_same, both, seen, without
from small_networks import ResNet, activations, backward, chain, images, kernels, state, step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import resfused


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step(dtype, layout, device):
    """Bit for bit the gradients, statistics and counters of the model that keeps what it makes."""
    model, eager = both(ResNet(), device, dtype)
    fused = without(model)
    x = images(device, dtype).contiguous(memory_format=layout)
    with seen() as found:
        actual = step(model, x)
    assert len(found.made) == MADE_AGAIN
    assert_same(actual, step(fused, x))
    if dtype is torch.float64:
        assert_close(actual, step(eager, x), 1e-9)


def test_what_is_alive_after_the_forward(device):
    model, _ = both(ResNet(), device)
    x = images(device)
    with seen() as found:
        kept = without(model)(x)
        assert (len(found.outputs), found.alive) == (NODES, KEPT)
    with seen() as found:
        y = model(x)
        assert (len(found.outputs), found.alive) == (NODES, KEPT - MADE_AGAIN)
        # As in eager: a loss that is held after the backward holds no activation.
        gc.disable()
        try:
            backward(y)
            assert found.alive == sum(not storage.expired() for storage in found.made) == 0
        finally:
            gc.enable()
    del kept


class Forms(Parts):
    """Every form between two convolutions."""

    def __init__(self, form, activation):
        super().__init__(relu=activation)
        self.form = form
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        if self.form == "norm+relu":
            return self.conv3(self.relu(self.a(x)))
        if self.form == "norm+add+relu":
            # Without a norm behind it conv2 keeps the shortcut.
            return self.conv3(self.relu(self.a(x) + x)) + self.conv2(x)
        if self.form == "norm+add(norm)+relu":
            return self.conv3(self.relu(self.a(x) + self.b(x)))
        return self.conv3(self.relu(F.batch_norm(self.conv1(x), None, None, self.bn1.weight, self.bn1.bias, True)))


@covering(
    form=["norm+relu", "norm+add+relu", "norm+add(norm)+relu", "functional"],
    activation=[nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid],
    mode=[(True, torch.float32), (True, torch.bfloat16), (False, torch.float64)],
)
def test_forms(form, activation, mode, device):
    """Bit for bit, whatever the activation."""
    training, dtype = mode
    model = Forms(form, activation()).to(device, dtype).train(training)
    model.bn1.eps = 0.3
    eager = copy.deepcopy(model)
    resfused.fuse_(model, recompute=True)
    fused = without(model)
    x = activations(device, dtype, number=3)
    with seen() as found:
        actual = step(model, x)
    # Frozen statistics are the forward's own.
    assert (len(found.outputs), len(found.made)) == ((1, 1) if training or form == "functional" else (2, 0))
    assert_same(actual, step(fused, x))
    if dtype is not torch.bfloat16:
        # PyTorch's derivative of hardsigmoid is a sixth as float32 has it.
        near = 1e-7 if activation is nn.Hardsigmoid else 1e-9
        assert_close(actual, step(eager, x), near if dtype is torch.float64 else 1e-5)


class DenseLayer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, 3, 3, padding=1, bias=False)

    def forward(self, features):
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))


class Dense(nn.Module):
    """Each of its layers reads what all before it have made; so does the last convolution."""

    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(CHANNELS + 3 * i) for i in range(layers))
        self.last = nn.Conv2d(CHANNELS + 3 * layers, 2, 1)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.last(torch.cat(tensors=features, dim=1))


class Branches(Parts):
    """A concatenation of two outputs, for two convolutions."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(2 * CHANNELS, 2, 1) for _ in range(2))

    def forward(self, x):
        y = torch.cat([self.relu(self.a(x)), self.relu(self.b(x))], 1)
        return self.heads[0](y) * self.heads[1](y)


@pytest.mark.parametrize(("network", "outputs", "concatenations"), [(Dense, 4, 5), (Branches, 2, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_concatenations(network, outputs, concatenations, layout, device):
    """Of their parts, each kept once; none of them nor of what is made of them is, and each is made once."""
    model, eager = both(network(), device)
    x = activations(device).contiguous(memory_format=layout)
    made, cat = [], torch.cat

    def noted(*arguments, **named):
        y = cat(*arguments, **named)
        made.append(StorageWeakRef(y.untyped_storage()))
        return y

    with seen() as found, mock.patch.object(torch, "cat", noted):
        y = model(x)
        assert (len(found.outputs), found.alive) == (outputs, 0)
        assert [storage.expired() for storage in made] == [True] * concatenations
        backward(y)
        assert len(found.made) == outputs
        assert [storage.expired() for storage in made] == [True] * 2 * concatenations
    backward(eager(x))
    assert_close(state(model), state(eager), 1e-9)


def test_a_part_of_a_concatenation_that_is_changed_in_place(device):
    """Of what is kept as it is PyTorch would not know, as its own concatenation is a copy: it is an error here."""
    model, _ = both(Dense(2), device)
    x = activations(device).requires_grad_() * 1
    y = model(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(y)


class Views(Parts):
    """What is kept of the output is a view of it: a part, for one group of channels, or all of it in another shape."""

    def __init__(self):
        super().__init__()
        self.part = nn.Conv2d(CHANNELS // 2, 2, 1)
        self.linear = nn.Linear(CHANNELS * 24, 3)

    def forward(self, x):
        y = self.relu(self.a(x))
        return self.part(y.chunk(2, 1)[1]).flatten(1).sum(1, keepdim=True) + self.linear(y.flatten(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views(layout, device):
    model, eager = both(Views(), device)
    x = activations(device).contiguous(memory_format=layout)
    with seen() as found:
        y = model(x)
        # Only of a contiguous output is the flat one a view.
        assert found.alive == 0
        backward(y)
    assert len(found.made) == 1
    backward(eager(x))
    assert_close(state(model), state(eager), 1e-9)


@pytest.mark.parametrize("times", [1, 2])
def test_a_shared_output_is_made_once_and_freed_by_its_last_user(times, device):
    """In every backward, before the norm's own, while the graph is retained."""
    model, eager = both(Shared(), device)
    x = activations(device)
    alive = []
    with seen() as found:
        y = model(x)
        plain = kernels.backward

        def looked(*arguments):
            alive.append([not storage.expired() for storage in found.made])
            return plain(*arguments)

        with mock.patch.object(kernels, "backward", looked):
            for _ in range(times):
                y.sum().backward(retain_graph=True)
    assert alive == [[False] * (i + 1) for i in range(times)]
    expected = eager(x)
    for _ in range(times):
        expected.sum().backward(retain_graph=True)
    assert_close(state(model), state(eager), 1e-9)


def test_a_branch_that_no_backward_reaches(device):
    """It holds what the other made for as long as eager would."""
    model, eager = both(Shared(), device)
    x = activations(device)
    with seen() as found:
        parts = model(x).split(2, 1)
        (gradient,) = torch.autograd.grad(parts[0].sum(), [model.heads[0].weight], retain_graph=True)
        assert [storage.expired() for storage in found.made] == [False]
        del parts
        assert [storage.expired() for storage in found.made] == [True]
    (expected,) = torch.autograd.grad(eager(x).split(2, 1)[0].sum(), [eager.heads[0].weight])
    assert_close({"gradient": gradient}, {"gradient": expected}, 1e-9)


def test_chosen_norms(device):
    """By a filter; in a place with two norms by both."""
    model, eager = both(ResNet(), device)
    resfused.fuse_(model, recompute=lambda norm, name: name in ("bn1", "layer1.0.bn1", "layer1.0.bn2"))
    x = images(device)
    with seen() as found:
        assert_close(step(model, x), step(eager, x), 1e-9)
    assert len(found.made) == 2


def test_the_report_says_which(device):
    model = ResNet().to(device)
    report = resfused.fuse_(model, recompute=lambda norm, name: name in ("bn1", "layer1.0.bn1", "layer1.0.bn2"))
    assert [place.norms for place in report.fused if place.recomputed] == [("bn1",), ("layer1.0.bn1",)]
    line = "outputs of 2 places made again in the backward; under torch.compile its partitioner decides that"
    assert line in str(report).splitlines()
    assert report.table().count(", made again ") == 2
    assert "made again" not in str(resfused.fuse_(model))


PIXELS = 3 * 6 * 4


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (Shared, CHANNELS),
        # Four norms' inputs and outputs and the last concatenation, for the input and what each of four layers makes.
        (Dense, 2 * (4 + 7 + 10 + 13) + 16 - (4 + 4 * 3)),
        # Both outputs are but parts of what is kept.
        (Branches, 2 * CHANNELS),
    ],
)
def test_the_bytes_that_are_saved(network, channels, device):
    model = network().to(device, torch.float64)
    report = resfused.fuse_(model, recompute=True)
    x = activations(device, number=3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.eval()
    assert report.saved_bytes(model, x) == channels * PIXELS * 8
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before)
    resfused.fuse_(model)
    assert report.saved_bytes(model, x) == 0


def test_wrong_arguments():
    with pytest.raises(TypeError, match="recompute must be a bool or callable, but got int"):
        resfused.fuse_(chain(), recompute=1)
