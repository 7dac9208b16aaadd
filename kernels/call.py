"""What the kernels are given and return, whichever implementation they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .activation import IDENTITY, RELU, Activation


class Norm(NamedTuple):
    """One BatchNorm's tensors, each of shape (C,) or None, and numbers; no eps where nothing is to be normalised."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float | None


NOTHING_BUT_STATISTICS = Norm(None, None, None, None, 0.0, None)


class Kept(NamedTuple):
    """What a forward leaves for its backward; see ``to_keep`` for what may be missing.

    The dtypes are needed where the tensors are not kept. No ``stats`` means frozen statistics, the running ones of the
    norms. Without ``x`` the gradients that come in lie as y does.
    """

    x: Tensor | None
    x_dtype: torch.dtype | None
    residual: Tensor | None
    residual_dtype: torch.dtype | None
    mask: Tensor | None
    stats: Tensor | None
    norm: Norm
    residual_norm: Norm | None
    activation: Activation = RELU


class Gradients(NamedTuple):
    """Which gradients are wanted, or the gradients; of the inputs of the forward in its order."""

    x: Tensor | bool | None
    residual: Tensor | bool | None
    weight: Tensor | bool | None
    bias: Tensor | bool | None
    residual_weight: Tensor | bool | None
    residual_bias: Tensor | bool | None


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic on these activations."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def promoted(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of y."""
    if residual is None or residual.dtype is x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, residual.dtype)


class ToKeep(NamedTuple):
    """Which of what is of full size a forward keeps for its backward; the mask has a bit an element."""

    x: bool
    residual: bool
    mask: bool


def to_keep(residual: bool, residual_norm: bool, training: bool, activation: Activation, wanted: Gradients) -> ToKeep:
    """The least that the ``wanted`` gradients of a form are made of.

    A normed input is kept where a sum with it is wanted: by its weight, or by its own gradient in training. The
    derivative of the activation needs z, which x and the residual give again, or where it has two values only a bit,
    unless z can be had from what is kept anyway.
    """
    x = bool(wanted.weight) or (training and bool(wanted.x))
    second = residual_norm and (bool(wanted.residual_weight) or (training and bool(wanted.residual)))
    if activation == IDENTITY or not any(wanted):
        return ToKeep(x, second, False)
    if activation.slopes is None:
        return ToKeep(True, residual, False)
    return ToKeep(x, second, not x or second != residual)


def check_mask(mask: Tensor | None, numel: int) -> None:
    """RuntimeError where a mask has not as many bytes: other kernels made it."""
    if mask is not None and mask.numel() != numel:
        raise RuntimeError("the backend was changed between a forward and its backward: the mask is another backend's")


def outputs(x: Tensor, residual: Tensor | None, mask_numel: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Room for y, and where it is to be ``masked`` for the bytes of its mask."""
    y = torch.empty_like(x, dtype=promoted(x, residual))
    return y, x.new_empty(mask_numel, dtype=torch.uint8) if masked else None


def parameter_gradients(norm: Norm, residual_norm: Norm | None, wanted: Gradients) -> list[Tensor | None]:
    """Room for the wanted gradients of the parameters."""
    second = (None, None) if residual_norm is None else residual_norm[:2]
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format) if want and p is not None else None
        for p, want in zip((norm.weight, norm.bias, *second), wanted[2:], strict=True)
    ]
