"""The arguments of a call, and what they must satisfy; checked before anything is changed."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ..backend import FLOATS
from ..kernels.call import Norm


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
    if type(training) is not bool:
        raise TypeError(f"training must be a bool, but got {type(training).__name__}")
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
    """``prefix`` goes before the arguments' names in messages, which are put together only where they are needed."""
    weight, bias, mean, var, momentum, eps = norm
    if type(momentum) is not float or type(eps) is not float or eps <= 0:
        _check_numbers(norm, training, prefix)
    if not training:
        for name, tensor in (("running_mean", mean), ("running_var", var)):
            if tensor is None:
                raise RuntimeError(f"{prefix}{name} must be given in evaluation mode (training=False), but got None")
    elif (mean is None) != (var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var must be given together or not at all")
    dtype, device = input.dtype, input.device
    channels = input.shape[1] if input.dim() > 1 else 0
    dtypes = (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)
    for tensor in (mean, var, weight, bias):
        if tensor is not None and (
            not isinstance(tensor, Tensor)
            or tensor.numel() != channels
            or tensor.dtype not in dtypes
            or tensor.device != device
        ):
            _refuse(norm, input, channels, dtypes, prefix)
    for name, tensor in (("running_mean", mean), ("running_var", var)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{prefix}{name} must not require a gradient: it is a statistic, and gets none")


def _refuse(norm: Norm, input: Tensor, channels: int, dtypes: tuple[torch.dtype, ...], prefix: str) -> None:
    """Raises for the first of a norm's vectors that is wrong."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is None:
            continue
        check_tensor(f"{prefix}{name}", tensor)
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{prefix}{name} must have {channels} elements, one per channel, but got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            raise RuntimeError(f"{prefix}{name} must have dtype {allowed} for this input, but got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"{prefix}{name} must be on the device of input, {input.device}, but got {tensor.device}"
            )


def _check_numbers(norm: Norm, training: bool, prefix: str) -> None:
    for name, value in (("momentum", norm.momentum), ("eps", norm.eps)):
        if not _is_number(value):
            raise TypeError(f"{prefix}{name} must be a number, but got {type(value).__name__}")
    if training and norm.eps <= 0:
        raise ValueError(f"{prefix}eps must be positive in training, but got {norm.eps}")
    if norm.eps < 0:
        raise ValueError(f"{prefix}eps must not be negative, but got {norm.eps}")


def _is_number(value: object) -> bool:
    """What PyTorch's operators take for one: a tensor of no dimensions too."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat))
