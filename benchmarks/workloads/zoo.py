"""Networks as their libraries write them, by name, with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from workloads import detection, families
from workloads.networks import cifar_resnet

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """``shape``: of a small input, of which each channel of the last stage still has 8 values or more."""

    make: Callable[[], nn.Module]
    shape: Shape = (2, 3, 64, 64)


def build(name: str) -> nn.Module:
    """The network ``name`` of ``NETWORKS``, ``FAMILIES`` or ``SMALL``, in training mode, its norms random too.

    Raises: ModuleNotFoundError where its library is not installed.
    """
    return with_random_norms(entry(name).make()).train()


def with_random_norms(network: nn.Module) -> nn.Module:
    """Of their weights and biases: timm's start a block's last norm at 0, which would hide its branch.

    Of frozen ones of their statistics too, with variances under which a sum of many branches stays small.
    """
    norm: Any
    for norm in network.modules():
        frozen = "FrozenBatchNorm" in type(norm).__name__
        if frozen or isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
        if frozen:
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 1.0, 4.0)
    return network


def entry(name: str) -> Entry:
    return next(table[name] for table in (SMALL, NETWORKS, FAMILIES) if name in table)


def logits_of(output: Tensor | object) -> Tensor:
    """What a network returns; transformers' return an object that has it, torchvision's for segmentation a dict."""
    if isinstance(output, dict) and "out" in output:
        return output["out"]
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def torchvision() -> ModuleType:
    """Its wheel fails to import beside a torch of another build, such as one for CPUs only: its own operators, of which
    no network here has any, are not there then, and their fake implementations cannot be registered."""
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    with mock.patch.object(torch.library, "register_fake", _register_nothing):
        return import_module("torchvision")


def _register_nothing(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda function: function


def _torchvision(name: str, shape: Shape = (2, 3, 64, 64), **settings: Any) -> Entry:
    return Entry(lambda: torchvision().models.get_model(name, weights=None, **settings), shape)


def _detector(name: str) -> Entry:
    def make() -> nn.Module:
        library = torchvision()
        # What cannot be loaded is as good as not installed.
        if not library.extension._has_ops():
            raise ModuleNotFoundError("torchvision's own operators, such as nms, are not there beside this torch")
        if name in families.FROZEN_DETECTORS:
            return detection.Detector(detection.with_frozen_norms(library, name))
        settings = {"weights": None, "weights_backbone": None, **detection.SETTINGS[name]}
        return detection.Detector(library.models.get_model(name, **settings))

    return Entry(make, (2, 3, 96, 96))


def _small_torchvision(block: str, width: int) -> Entry:
    """Its first two stages, of one block and two. ``width``: of a bottleneck's middle, where ResNet-50 has 64."""

    def make() -> nn.Module:
        resnet = torchvision().models.resnet
        network = resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], width_per_group=width)
        network.layer3 = network.layer4 = nn.Identity()
        network.fc = nn.Linear(network.fc.in_features // 4, 10)
        return network

    return Entry(make, (4, 3, 16, 16))


def _timm(name: str, shape: Shape = (2, 3, 64, 64), **settings: Any) -> Entry:
    def make() -> nn.Module:
        torchvision()
        return import_module("timm").create_model(name, **settings)

    return Entry(make, shape)


def _transformers(**settings: Any) -> Entry:
    def make() -> nn.Module:
        transformers = import_module("transformers")
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))

    return Entry(make)


def _cifar(depth: int, shape: Shape = (2, 3, 32, 32)) -> Entry:
    return Entry(lambda: cifar_resnet(depth), shape)


NETWORKS: dict[str, Entry] = {
    **{f"torchvision/{name}": _torchvision(name) for name in (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2",
        "regnet_x_400mf", "regnet_y_400mf",
    )},
    **{f"timm/{name}": _timm(name) for name in (
        "resnet18", "resnet50", "resnet50d", "resnet101", "resnext50_32x4d", "seresnet50", "ecaresnet50d",
        "resnetv2_50",
    )},
    "transformers/resnet18": _transformers(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]
    ),
    "transformers/resnet50": _transformers(layer_type="bottleneck"),
    **{f"cifar/resnet{depth}": _cifar(depth) for depth in (20, 56)},
}  # fmt: skip

_ALONE = {"aux_logits": False, "init_weights": False}
_INCEPTION: Shape = (2, 3, 107, 107)
_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": _ALONE,
    "inception_v3": {**_ALONE, "shape": _INCEPTION},
    **{name: {"weights_backbone": None} for name in families.TORCHVISION[-3:]},
    **{name: {"shape": _INCEPTION} for name in ("inception_resnet_v2", "inception_v4", "pnasnet5large")},
    # Of these the last stage is 64 times smaller than the input.
    **{name: {"shape": (2, 3, 128, 128)} for name in ("efficientvit_m0", "shvit_s1")},
}
FAMILIES: dict[str, Entry] = {
    **{f"torchvision/{name}": _torchvision(name, **_SETTINGS.get(name, {})) for name in families.TORCHVISION},
    **{f"torchvision/{name}": _detector(name) for name in (*families.DETECTORS, *families.FROZEN_DETECTORS)},
    **{f"timm/{name}": _timm(name, **_SETTINGS.get(name, {})) for name in families.TIMM},
}

SMALL: dict[str, Entry] = {
    "small/torchvision_basic": _small_torchvision("BasicBlock", 64),
    "small/torchvision_bottleneck": _small_torchvision("Bottleneck", 4),
    "small/timm_attention": _timm("seresnet18", layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), num_classes=10),
    "small/transformers_basic": _transformers(
        layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=10
    ),
    "small/cifar_resnet8": _cifar(8, (2, 3, 16, 16)),
}
"""Of the same code, small enough for Triton's interpreter."""
