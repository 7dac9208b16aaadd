"""Norms whose statistics and parameters are fixed, of every library; detectron2's without that library."""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

RANGES = {"weight": (-1.0, 1.0), "bias": (-0.5, 0.5), "running_mean": (-1.0, 1.0), "running_var": (0.5, 1.5)}


class OfDetectron2(nn.Module):
    """As it is there: its code asks whether its input wants a gradient, and its result has the input's dtype."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)


OfDetectron2.__name__ = OfDetectron2.__qualname__ = "FrozenBatchNorm2d"
OfDetectron2.__module__ = OfDetectron2.forward.__module__ = "detectron2.layers.batch_norm"


def importable(monkeypatch):
    """Puts the module there that pickle takes the class from."""
    for name in ("detectron2", "detectron2.layers", "detectron2.layers.batch_norm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["detectron2.layers.batch_norm"].FrozenBatchNorm2d = OfDetectron2


class CopiedFrozenBatchNorm2d(nn.Module):
    """As DETR and those after it have it, and transformers under many names: torchvision's, the operands elsewhere."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        for name in RANGES:
            self.register_buffer(name, torch.ones(num_features))

    def forward(self, x):
        w, b = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        variance, mean = self.running_var.view(1, -1, 1, 1), self.running_mean.view(1, -1, 1, 1)
        scale = torch.rsqrt(0.01 + variance) * w
        shift = b - scale * mean
        return shift + scale * x


def with_random_frozen_norms(model):
    """Their own buffers, away from what would hide an error."""
    for module in model.modules():
        if "Frozen" in type(module).__name__:
            for name, (low, high) in RANGES.items():
                getattr(module, name).uniform_(low, high)
    return model
