"""Passes over memory of a network's norms, additions and ReLUs in a training step, eager and fused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from count.node_passes import BACKWARD, FORKED, FORWARD, eager_passes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import resfused


@dataclass(frozen=True)
class Passes:
    """Per normalised element, an element of the input of one of the network's norms; as ``traffic.Total`` has them.

    Half precision, separate launches; what is read and written per channel and by convolutions is not counted.
    ``places``: how many tails of each form.
    """

    eager: float
    fused: float
    places: dict[str, int]


def count_passes(network: nn.Module, example: Tensor) -> Passes:
    """Of ``network``, of reference blocks, on inputs of the shape of ``example``, without its batch axis.

    Eager's passes are those of ``traffic.eager_passes``, and the fused network's what ``fuse_`` reports.

    Raises: RuntimeError where ``fuse_`` leaves a norm as it is.
    """
    sizes = _norm_sizes(network, example)
    report = resfused.fuse_(copy.deepcopy(network).cpu())
    if report.left:
        raise RuntimeError(f"norms left unfused: {report.left}")
    eager = fused = 0.0
    places: dict[str, int] = {}
    for place in report.fused:
        passes = eager_passes(place.form, FORWARD) + eager_passes(place.form, FORKED if place.forked else BACKWARD)
        elements = sizes[place.norms[0]]
        eager += passes * elements
        fused += (passes - place.passes_saved) * elements
        places[place.form] = places.get(place.form, 0) + 1
    normalised = sum(sizes.values())
    return Passes(eager / normalised, fused / normalised, places)


def as_sentence(network: str, passes: dict[str, Any]) -> str:
    """Of a record of ``Passes``."""
    return (
        f"{network}: {passes['fused']:.2f} passes over memory per normalised element in a training step with fused "
        f"blocks, {passes['eager']:.2f} with reference blocks."
    )


def _norm_sizes(network: nn.Module, example: Tensor) -> dict[str, int]:
    """Elements of the input of each norm, by its name, for one example."""
    sizes: dict[str, int] = {}
    watched = copy.deepcopy(network).cpu().eval()
    for name, module in watched.named_modules():
        if isinstance(module, _BatchNorm):

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                sizes[name] = inputs[0].numel()

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        watched(example.cpu()[None].to(next(watched.parameters()).dtype))
    return sizes
