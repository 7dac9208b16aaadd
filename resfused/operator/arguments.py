"""The arguments of a call, and what they must satisfy; checked before anything is changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import FLOATS


class Norm(NamedTuple):
    """One batch norm's tensors, of C elements or None, and numbers."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")


def check_call(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    training: bool,
    synchronised: bool = False,
) -> None:
    """Raises what ``resfused.functional`` says; a missing residual is the form that has none.

    With ``synchronised`` statistics one value per channel is enough: other processes have more.
    """
    _check_activation(input)
    if training and not synchronised:
        _check_values(input)
    _check_norm(input, norm, training)
    if residual is not None:
        _check_residual(residual, input)
        if residual_norm is not None:
            _check_norm(residual, residual_norm, training, prefix="residual_")


def _check_values(input: Tensor) -> None:
    if input.dim() > 1 and input.numel() == input.shape[1] > 0:
        raise ValueError(
            f"input must have more than one value per channel in training, but got shape {tuple(input.shape)}"
        )


def _check_activation(input: Tensor) -> None:
    check_tensor("input", input)
    # PyTorch lets an empty vector through, as a batch of no channels.
    if input.dim() < 2 and input.shape != (0,):
        raise IndexError(f"input must have at least 2 dimensions (N, C, ...), but got shape {tuple(input.shape)}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"input must be of a floating dtype, but got {input.dtype}")


def _check_residual(residual: Tensor, input: Tensor) -> None:
    if residual.shape != input.shape:
        raise RuntimeError(
            f"residual must have the shape of input, {tuple(input.shape)}, but got {tuple(residual.shape)}; "
            "expand it first if it should be broadcast"
        )
    if residual.dtype not in FLOATS:
        raise NotImplementedError(f"residual must be of a floating dtype, but got {residual.dtype}")
    if residual.device != input.device:
        raise RuntimeError(f"residual must be on the device of input, {input.device}, but got {residual.device}")


def _check_norm(input: Tensor, norm: Norm, training: bool, prefix: str = "") -> None:
    """``prefix`` goes before the arguments' names in messages."""
    weight, bias, running_mean, running_var, _, eps = norm
    if not training:
        for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
            if tensor is None:
                raise RuntimeError(f"{prefix}{name} must be given in evaluation mode (training=False), but got None")
    elif (running_mean is None) != (running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var must be given together or not at all")
    if training and eps <= 0:
        raise ValueError(f"{prefix}eps must be positive in training, but got {eps}")
    if eps < 0:
        raise ValueError(f"{prefix}eps must not be negative, but got {eps}")
    channels = input.shape[1] if input.dim() > 1 else 0
    half = input.dtype in (torch.float16, torch.bfloat16)
    for name, tensor in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{prefix}{name} must have {channels} elements, one per channel, but got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != input.dtype and not (half and tensor.dtype == torch.float32):
            allowed = f"{input.dtype} or torch.float32" if half else str(input.dtype)
            raise RuntimeError(f"{prefix}{name} must have dtype {allowed} for this input, but got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"{prefix}{name} must be on the device of input, {input.device}, but got {tensor.device}"
            )
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{prefix}{name} must not require a gradient: it is a statistic, and gets none")
