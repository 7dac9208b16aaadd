"""A small residual network in plain PyTorch, written as torchvision writes its own, and what a training step leaves."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from resfused.kernels import cpu, gpu
from torch import Tensor, nn

import resfused
from resfused.conversion.fused_forward import FusedForward

kernels = gpu if torch.cuda.is_available() else cpu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; one ``nn.ReLU(inplace=True)`` for both places."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; ``F.relu``."""

    def __init__(self, in_channels: int, width: int, channels: int, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return F.relu(out)


def projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(nn.Module):
    """Stem, a stage of two basic blocks, a stage of two bottlenecks, head: (N, 3, H, W) to (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(4, 6, 2, projection(4, 6, 2)), BasicBlock(6, 6))
        self.layer2 = nn.Sequential(Bottleneck(6, 4, 8, projection(6, 8, 1)), Bottleneck(8, 4, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def chain() -> nn.Sequential:
    """Two stages of one block each, (N, 4, H, W) to (N, 6, H / 2, W / 2): every form, and a pair across their ends."""
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Sequential(BasicBlock(4, 4)), layer2=nn.Sequential(BasicBlock(4, 6, 2, projection(4, 6, 2)))
        )
    )


def fused_and_eager(
    model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float64, recompute: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The model fused, and as it was; no parameter or statistic has a value that would hide an error."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    eager = model.to(device, dtype)
    fused = copy.deepcopy(eager)
    report = resfused.fuse_(fused, recompute=recompute)
    assert not report.left
    return fused, eager


def is_fused(model: nn.Module) -> bool:
    """Whether every module whose code has a site runs fused code, as long as nothing speaks against it."""
    kinds = (BasicBlock, Bottleneck, ResNet)
    found = [m.__dict__.get("forward") for m in model.modules() if isinstance(m, kinds)]
    return bool(found) and all(isinstance(forward, FusedForward) for forward in found)


def images(device: torch.device, dtype: torch.dtype = torch.float64, number: int = 2) -> Tensor:
    return torch.randn(number, 3, 12, 12, device=device, dtype=dtype)


def activations(device: torch.device, dtype: torch.dtype = torch.float64, number: int = 2) -> Tensor:
    """What ``chain`` takes."""
    return torch.randn(number, 4, 6, 4, device=device, dtype=dtype)


def backward(y: Tensor) -> None:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device)
    y.backward(weights.view_as(y))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers, by the names of the bare model."""
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name.replace("_orig_mod.", "").replace("module.", ""): tensor for name, tensor in found.items()}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Everything that a training step leaves behind."""
    model.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(leaf)
    backward(y)
    return {"output": y.detach(), "gradient of the input": leaf.grad, **state(model)}


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


@contextmanager
def counted(kernels: ModuleType = kernels) -> Iterator[list[int]]:
    """Of the nodes that ran on the kernels, afterwards: how many forward, backward, and backward with two gradients."""
    with (
        mock.patch.object(kernels, "forward", wraps=kernels.forward) as forward,
        mock.patch.object(kernels, "backward", wraps=kernels.backward) as backward,
    ):
        ran: list[int] = []
        yield ran
        pairs = sum(call.args[1] is not None for call in backward.call_args_list)
        ran += [forward.call_count, backward.call_count, pairs]


def pairs(model, x):
    """How many nodes of a training step were given two gradients to add."""
    with counted() as ran:
        step(model, x)
    return ran[2]


def nodes(model, x):
    """How many fused nodes a training step has."""
    with counted() as ran:
        step(copy.deepcopy(model), x)
    return ran[0]
