"""The loss gradient at each block's input, as a whole and along each of the two paths that it comes by.

A block y = relu(F(x) + x) has, with z = F(x) + x and dz = dy where z > 0, the gradient dx = J_F^T dz + dz: what comes
through the branch, and the direct term, dz itself, which no weight has touched (He, Zhang, Ren, Sun, "Identity Mappings
in Deep Residual Networks", ECCV 2016, equation 5, there without the last ReLU). In a block with a projection P the
direct term is J_P^T dz.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads.networks import PlainBlock


@dataclass
class Profile:
    """Norms over a whole batch, one for each block, the first block first.

    ``whole``: of the gradient at its input. Of residual blocks also ``direct``: what comes through the shortcut;
    ``branch``: what comes through the convolutions; ``shortcuts_only``: of the gradient that reaches the block where
    every later block, and itself, passes nothing through its branch: the product of the direct terms.
    """

    whole: list[float]
    direct: list[float] = field(default_factory=list)
    branch: list[float] = field(default_factory=list)
    shortcuts_only: list[float] = field(default_factory=list)


def profile(network: nn.Sequential, x: Tensor, labels: Tensor) -> Profile:
    """Of the cross-entropy of ``network``, one of ``networks.cifar_*``, in the mode it is in.

    Running statistics are updated where that mode does so: measure a copy.
    """
    shares = gradients(network, x, labels)
    if any(isinstance(block, PlainBlock) for block in blocks_of(network)):
        return Profile(_norms(shares.whole))
    through_shortcuts = gradients(network, x, labels, detach_branches=True)
    return Profile(*map(_norms, (shares.whole, shares.direct, shares.branch, through_shortcuts.whole)))


@dataclass(frozen=True)
class Gradients:
    """At each block's input: ``whole`` is ``direct`` + ``branch``; of plain blocks all comes through the branch."""

    whole: list[Tensor]
    direct: list[Tensor]
    branch: list[Tensor]


def gradients(network: nn.Sequential, x: Tensor, labels: Tensor, detach_branches: bool = False) -> Gradients:
    """With ``detach_branches`` the branches are constants to the gradient."""
    inputs: list[Tensor] = []
    shortcuts: list[Tensor] = []
    branches: list[Tensor] = []
    for module in network:
        if not hasattr(module, "conv1"):
            x = module(x)
            continue
        x = x.requires_grad_() if x.is_leaf else x
        shortcut, branch = x.view_as(x), x.view_as(x)
        inputs.append(x)
        shortcuts.append(shortcut)
        branches.append(branch)
        x = _forward_apart(module, shortcut, branch.detach() if detach_branches else branch)
    loss = F.cross_entropy(x, labels)
    found = torch.autograd.grad(loss, [*inputs, *shortcuts, *branches], allow_unused=True, materialize_grads=True)
    n = len(inputs)
    return Gradients(list(found[:n]), list(found[n : 2 * n]), list(found[2 * n :]))


def blocks_of(network: nn.Sequential) -> list[nn.Module]:
    return [module for module in network if hasattr(module, "conv1")]


def _forward_apart(block: nn.Module, shortcut: Tensor, branch: Tensor) -> Tensor:
    """``block(x)`` whose shortcut takes one tensor and whose branch another, so that each has a gradient of its own.

    The branch begins with ``conv1``, which a hook hands its tensor: the block's own forward runs, reference or fused.
    """
    conv1 = block.get_submodule("conv1")
    handle = conv1.register_forward_pre_hook(lambda module, inputs: (branch,))
    try:
        y: Tensor = block(shortcut)
    finally:
        handle.remove()
    return y


def _norms(tensors: list[Tensor]) -> list[float]:
    return [float(tensor.double().norm()) for tensor in tensors]
