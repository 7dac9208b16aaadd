"""Modules whose code each test of ``fuse_`` writes, and the comparison of one call of them fused and as they are."""

import copy

import torch
import torch.nn.functional as F
from oracle import relative_error
from torch import nn

import resfused

CHANNELS = 4
ALONE, SUM, SUM_NORM = "norm", "norm+add", "norm+add(norm)"
RELU, ADD, ADD_NORM = "norm+relu", "norm+add+relu", "norm+add(norm)+relu"


def conv():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)


def norm():
    return nn.BatchNorm2d(CHANNELS)


class Parts(nn.Module):
    """Two convolutions with norms, and a ReLU, for the code that each test writes."""

    def __init__(self, code=None, relu=None):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), norm(), conv(), norm()
        self.relu = relu or nn.ReLU(inplace=True)
        if code is not None:
            self.__class__ = type(self.__class__.__name__, (self.__class__,), {"forward": code})

    def a(self, x):
        return self.bn1(self.conv1(x))

    def b(self, x):
        return self.bn2(self.conv2(x))


def alone(model, x):
    return model(x)


def step(model, x, training=True, call=alone):
    """Everything that one call leaves behind: output, gradients, buffers, and what became of the caller's tensor."""
    model.train(training).zero_grad()
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    y = call(model, given)
    results = {"given": given.detach().clone()}
    for i, part in enumerate(y if isinstance(y, tuple) else (y,)):
        results[f"output {i}"] = part.detach().clone()
    sum((part * torch.linspace(-1, 2, part.numel(), dtype=part.dtype, device=part.device).view_as(part)).sum()
        for part in (y if isinstance(y, tuple) else (y,))).backward()  # fmt: skip
    results["input"] = leaf.grad
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def fused_like_plain(model, device, shape=(3, CHANNELS, 4, 5), tolerance=1e-9, call=alone):
    """Fuses the model, whose numbers must stay those of a copy that was not; the report."""
    torch.manual_seed(1)
    model = model.to(device, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    plain = copy.deepcopy(model)
    report = resfused.fuse_(model)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    for training in (True, False):
        actual, expected = step(model, x, training, call), step(plain, x, training, call)
        assert actual.keys() == expected.keys()
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) < tolerance, errors
    return report


def forms(report):
    return [entry.form for entry in report.fused]


ACTIVATIONS = {
    "nn.ReLU": lambda self, x: self.relu(self.a(x)),
    "F.relu": lambda self, x: F.relu(self.a(x)),
    "F.relu in place": lambda self, x: F.relu(self.a(x), inplace=True),
    "F.relu_": lambda self, x: F.relu_(self.a(x)),
    "torch.relu": lambda self, x: torch.relu(self.a(x)),
    "torch.relu_": lambda self, x: torch.relu_(self.a(x)),
    "Tensor.relu": lambda self, x: self.a(x).relu(),
    "Tensor.relu_": lambda self, x: self.a(x).relu_(),
}


def add_in_place(self, x):
    out = self.a(x)
    out += x
    return self.relu(out)


def add_to_fresh(self, x):
    shortcut = self.conv2(x)
    shortcut += self.a(x)
    return self.relu(shortcut)


ADDITIONS = {
    "out + x": (ADD, lambda self, x: self.relu(self.a(x) + x)),
    "x + out": (ADD, lambda self, x: self.relu(x + self.a(x))),
    "out += x": (ADD, add_in_place),
    "shortcut += out": (ADD, add_to_fresh),
    "torch.add": (ADD, lambda self, x: F.relu(torch.add(self.a(x), x))),
    "Tensor.add": (ADD, lambda self, x: F.relu(self.a(x).add(x))),
    "Tensor.add_": (ADD, lambda self, x: F.relu(self.a(x).add_(x))),
    "two norms": (ADD_NORM, lambda self, x: self.relu(self.a(x) + self.b(x))),
    "two norms, in place": (ADD_NORM, lambda self, x: self.relu(self.a(x).add_(self.b(x)))),
    "a norm of the input": (ADD, lambda self, x: self.relu(self.bn1(x) + x)),
    "broadcast": (ADD, lambda self, x: self.relu(self.a(x) + x.mean((2, 3), keepdim=True))),
    "broadcast, two norms": (ADD_NORM, lambda self, x: self.relu(self.a(x) + self.b(x[:, :, :1]))),
}
