"""BatchNorm modules with the residual addition and the activation fused in; drop-ins for ``torch.nn.BatchNorm*d``."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .frozen import frozen, is_frozen_norm
from .kernels.activation import RELU, Activation, activation_of
from .kernels.call import Norm
from .operator import synchronised
from .operator.arguments import check_call, check_tensor
from .operator.dispatch import normalise_add_activate
from .reference import activate


def _call(norm: nn.Module, input: Tensor) -> tuple[bool, Norm]:
    """What ``nn.BatchNorm.forward`` passes to ``F.batch_norm``: whether to take the batch's statistics, the rest."""
    if is_frozen_norm(norm):
        return False, frozen(norm).norm(input.dtype)
    assert isinstance(norm, _BatchNorm)
    mean, var = norm.running_mean, norm.running_var
    if norm.training and not norm.track_running_stats:
        mean = var = None
    momentum = norm.momentum
    if momentum is None:
        # The cumulative average, of this batch too. It is counted once the arguments have been checked.
        counter = _counter(norm)
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    return _takes_batch_statistics(norm), Norm(norm.weight, norm.bias, mean, var, momentum, norm.eps)


def _takes_batch_statistics(norm: Any) -> bool:
    if is_frozen_norm(norm):
        return False
    return bool(norm.training) or (norm.running_mean is None and norm.running_var is None)


def _counter(norm: Any) -> Tensor | None:
    """``num_batches_tracked`` where this call counts."""
    counts = norm.training and not is_frozen_norm(norm) and norm.track_running_stats
    return norm.num_batches_tracked if counts else None


def _count(norm: nn.Module | None) -> None:
    counter = None if norm is None else _counter(norm)
    if counter is not None:
        counter.add_(1)


def is_norm(module: object) -> bool:
    """Whether its forward is PyTorch's batch norm or a frozen one, which ``tail`` computes: not a subclass's own."""
    if not isinstance(module, _BatchNorm):
        return is_frozen_norm(module)
    return type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_batch_norm(module: object) -> bool:
    """Whether it is a BatchNorm by its class, or a frozen one by its name, whatever its forward computes."""
    return isinstance(module, _BatchNorm) or is_frozen_norm(module) or "FrozenBatchNorm" in type(module).__name__


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than running its forward: hooks, a call of its own, compilation."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or type(module).__call__ is not nn.Module.__call__
    )


def _process_group(norm: nn.Module) -> Any:
    """The processes that ``nn.SyncBatchNorm.forward`` takes statistics over; None where it takes its own alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    process_group = norm.process_group or dist.group.WORLD
    return process_group if dist.get_world_size(process_group) > 1 else None


def _fuses(norm: nn.Module, input: Tensor) -> bool:
    """Whether calling it with the input is what ``_fused`` does with both."""
    if not is_norm(norm) or is_watched(norm) or "forward" in norm.__dict__:
        return False
    return not is_frozen_norm(norm) or frozen(norm).fits(input)


def normed_dtype(norm: nn.Module | None, input: Tensor) -> Tensor:
    """The input in the dtype of norm(input), which of a frozen norm may be a wider one."""
    return input.to(frozen(norm).dtype(input)) if is_frozen_norm(norm) else input  # type: ignore[arg-type]


def _agree(norm: nn.Module, residual_norm: nn.Module) -> bool:
    """Whether both are in the same mode, over the same processes."""
    # Not through _call, which with momentum=None waits for the device.
    same_mode = _takes_batch_statistics(norm) == _takes_batch_statistics(residual_norm)
    return same_mode and _process_group(norm) is _process_group(residual_norm)


def tail(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
    activation: str | Activation = RELU,
) -> Tensor:
    """activation(norm(input) + s) with the bookkeeping of the modules: modes, running statistics, num_batches_tracked.

    s is nothing, ``residual``, or ``residual_norm(residual)``; ``activation`` one of ``resfused.ACTIVATIONS`` by name,
    or with a parameter ``resfused.Activation("leaky_relu", 0.2)``. Shapes, dtypes and errors are those of
    ``resfused.functional``, with the modules' own rank check (ValueError); TypeError for a norm that is no BatchNorm,
    and for a missing ``residual`` of a ``residual_norm``. ``nn.SyncBatchNorm`` takes its statistics over its process
    group where its own forward would, on the CPU too. The ``FrozenBatchNorm2d`` of torchvision, timm and detectron2 are
    norms in evaluation, with a result in the dtype that theirs has.

    Called as they are, unfused: modules with hooks; subclasses with a forward of their own, say timm's BatchNormAct2d;
    of two norms in different modes or over different processes the residual's; one norm given twice; a frozen norm of
    anything but (N, C, H, W).
    """
    return forked_tail(norm, input, residual, residual_norm, activation_of(activation), forked=False)[0]


def forked_tail(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
    activation: Activation = RELU,
    forked: bool = True,
) -> tuple[Tensor, Tensor]:
    """``tail`` for two uses of its output: see ``FusedResidualBlock`` for what ``forked`` asks of them."""
    _check_batch_norm("norm", norm)
    if residual_norm is not None:
        _check_batch_norm("residual_norm", residual_norm)
    if residual is not None or residual_norm is not None:
        check_tensor("residual", residual)
    check_tensor("input", input)
    if not _fuses(norm, input) or norm is residual_norm:
        y = norm(input)
        if residual is not None:
            y = y + (residual if residual_norm is None else residual_norm(residual))
        y = activate(y, activation)
        return y, y
    input = normed_dtype(norm, input)
    if residual_norm is not None and residual is not None:
        fuses = _fuses(residual_norm, residual)
        if fuses and _agree(norm, residual_norm):
            residual = normed_dtype(residual_norm, residual)
        else:
            _checked(norm, input, residual if fuses else None)
            residual, residual_norm = residual_norm(residual), None
    return _fused(norm, input, residual, residual_norm, activation, forked)


def _check_batch_norm(name: str, norm: object) -> None:
    # A compiled module is none, and holds one.
    if not is_batch_norm(norm) and not is_batch_norm(getattr(norm, "_orig_mod", None)):
        raise TypeError(
            f"{name} must be a BatchNorm, one of torch.nn.BatchNorm1d, 2d, 3d, SyncBatchNorm or a subclass, or a "
            f"FrozenBatchNorm2d, but got {type(norm).__name__}"
        )


def _fused(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
    activation: Activation = RELU,
    forked: bool = False,
) -> tuple[Tensor, Tensor]:
    """``forked_tail`` of norms that fuse."""
    training, own, residual_own, process_group = _checked(norm, input, residual, residual_norm)
    # Before the node: a checkpoint's recomputation stops in it, and counts as PyTorch's does.
    for each in (norm, residual_norm):
        _count(each)
    if process_group is None:
        return normalise_add_activate(input, residual, own, residual_own, activation, training, forked)
    return synchronised.normalise_add_activate(input, residual, own, residual_own, activation, process_group, forked)


def _checked(
    norm: nn.Module, input: Tensor, residual: Tensor | None, residual_norm: nn.Module | None = None
) -> tuple[bool, Norm, Norm | None, Any]:
    """Whether to take the batch's statistics, the norms' own arguments, the process group: all checked."""
    _check_input("input", norm, input)
    training, own = _call(norm, input)
    residual_own = None
    if residual_norm is not None and residual is not None:
        _check_input("residual", residual_norm, residual)
        _, residual_own = _call(residual_norm, residual)
    process_group = _process_group(norm)
    check_call(input, residual, own, residual_own, training, synchronised=process_group is not None)
    return training, own, residual_own, process_group


def _check_input(name: str, norm: nn.Module, input: Any) -> None:
    check_tensor(name, input)
    if isinstance(norm, _BatchNorm):
        norm._check_input_dim(input)
    if isinstance(norm, nn.SyncBatchNorm):
        norm._check_non_zero_input_channels(input)


class _NoConversion:
    """Refuses PyTorch's conversion, which would drop the activation, where it asks every norm for its ``qconfig``.

    What the conversion has replaced before it came here stays replaced; this module is as it was.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if sys._getframe(1).f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__code__:
            raise RuntimeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of {owner.__name__}: "
                "use resfused.convert_sync_batchnorm"
            )
        raise AttributeError("qconfig")


class _BatchNormAct(_BatchNorm):
    qconfig = _NoConversion()
    activation: Activation = RELU

    def forward(self, input: Tensor) -> Tensor:
        return _fused(self, input, activation=self.activation)[0]


class _BatchNormAddAct(_BatchNorm):
    qconfig = _NoConversion()
    activation: Activation = RELU

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        check_tensor("residual", residual)
        return _fused(self, input, residual, activation=self.activation)[0]


class _Chosen(nn.Module):
    """Of a norm: its activation, given with the arguments of ``torch.nn.BatchNorm*``."""

    activation: Activation

    def __init__(
        self,
        *args: Any,
        activation: str | Activation = RELU,
        negative_slope: float = 0.01,
        approximate: str = "none",
        **kwargs: Any,
    ):
        chosen = activation_of(activation, negative_slope, approximate)
        super().__init__(*args, **kwargs)
        self.activation = chosen

    def extra_repr(self) -> str:
        name, slope = self.activation
        return f"{super().extra_repr()}, activation={name}" + (f", negative_slope={slope}" if slope else "")


class BatchNormReLU1d(_BatchNormAct, nn.BatchNorm1d):
    """relu(BatchNorm1d(input)), (N, C) or (N, C, L); arguments, state_dict and errors of ``torch.nn.BatchNorm1d``."""


class BatchNormReLU2d(_BatchNormAct, nn.BatchNorm2d):
    """relu(BatchNorm2d(input)), (N, C, H, W); arguments, state_dict and errors of ``torch.nn.BatchNorm2d``."""


class BatchNormReLU3d(_BatchNormAct, nn.BatchNorm3d):
    """relu(BatchNorm3d(input)), (N, C, D, H, W); arguments, state_dict and errors of ``torch.nn.BatchNorm3d``."""


class BatchNormAddReLU1d(_BatchNormAddAct, nn.BatchNorm1d):
    """relu(BatchNorm1d(input) + residual), both (N, C) or (N, C, L); otherwise as ``torch.nn.BatchNorm1d``."""


class BatchNormAddReLU2d(_BatchNormAddAct, nn.BatchNorm2d):
    """relu(BatchNorm2d(input) + residual), both (N, C, H, W); otherwise as ``torch.nn.BatchNorm2d``."""


class BatchNormAddReLU3d(_BatchNormAddAct, nn.BatchNorm3d):
    """relu(BatchNorm3d(input) + residual), both (N, C, D, H, W); otherwise as ``torch.nn.BatchNorm3d``."""


class BatchNormAct1d(_Chosen, _BatchNormAct, nn.BatchNorm1d):
    """activation(BatchNorm1d(input)), (N, C) or (N, C, L); arguments and errors of ``torch.nn.BatchNorm1d``, state too.

    By keyword ``activation="relu"``, one of ``resfused.ACTIVATIONS`` by its name in ``torch.nn.functional``,
    ``negative_slope=0.01`` for ``leaky_relu`` and ``approximate="none"`` for ``gelu``. Errors: TypeError for one of
    another type, ValueError for an unknown one.
    """


class BatchNormAct2d(_Chosen, _BatchNormAct, nn.BatchNorm2d):
    """activation(BatchNorm2d(input)), (N, C, H, W); otherwise as ``BatchNormAct1d`` and ``torch.nn.BatchNorm2d``."""


class BatchNormAct3d(_Chosen, _BatchNormAct, nn.BatchNorm3d):
    """activation(BatchNorm3d(input)), (N, C, D, H, W); otherwise as ``BatchNormAct1d`` and ``torch.nn.BatchNorm3d``."""


class BatchNormAddAct1d(_Chosen, _BatchNormAddAct, nn.BatchNorm1d):
    """activation(BatchNorm1d(input) + residual), both (N, C) or (N, C, L); otherwise as ``BatchNormAct1d``."""


class BatchNormAddAct2d(_Chosen, _BatchNormAddAct, nn.BatchNorm2d):
    """activation(BatchNorm2d(input) + residual), both (N, C, H, W); otherwise as ``BatchNormAct2d``."""


class BatchNormAddAct3d(_Chosen, _BatchNormAddAct, nn.BatchNorm3d):
    """activation(BatchNorm3d(input) + residual), both (N, C, D, H, W); otherwise as ``BatchNormAct3d``."""


FUSED_NORMS = (_BatchNormAct, _BatchNormAddAct)


class SyncBatchNormReLU(_BatchNormAct, nn.SyncBatchNorm):
    """relu(SyncBatchNorm(input)), (N, C, ...); arguments and state_dict of ``torch.nn.SyncBatchNorm``.

    Statistics are those of all processes of the group, the same in every one; batches may differ in size, or be empty.
    It runs on the CPU too. Errors: ValueError for fewer than 2 dimensions, for no channels, and where every batch is
    empty (found out after ``num_batches_tracked`` has counted the call); RuntimeError for a second derivative;
    otherwise those of ``resfused.functional``.
    """


class SyncBatchNormAddReLU(_BatchNormAddAct, nn.SyncBatchNorm):  # type: ignore[misc]
    """relu(SyncBatchNorm(input) + residual), both (N, C, ...); otherwise as ``SyncBatchNormReLU``."""


class SyncBatchNormAct(_Chosen, _BatchNormAct, nn.SyncBatchNorm):
    """activation(SyncBatchNorm(input)), (N, C, ...); otherwise as ``SyncBatchNormReLU`` and ``BatchNormAct1d``."""


class SyncBatchNormAddAct(_Chosen, _BatchNormAddAct, nn.SyncBatchNorm):  # type: ignore[misc]
    """activation(SyncBatchNorm(input) + residual), both (N, C, ...); otherwise as ``SyncBatchNormAct``."""


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` that keeps the activation of this package's norms.

    Every ``BatchNormReLU*`` becomes a ``SyncBatchNormReLU``, every ``BatchNormAddReLU*`` a ``SyncBatchNormAddReLU``,
    ``BatchNormAct*`` and ``BatchNormAddAct*`` alike, every other BatchNorm a ``torch.nn.SyncBatchNorm``, with the same
    parameters and buffers. ``module`` itself is changed and returned, unless it is a norm: then the new one is.

    PyTorch's own conversion raises a RuntimeError when it comes to a norm with an activation; it leaves that module as
    it was, and the norms that it has replaced before, replaced. Converting the model with this function afterwards is
    right.
    """
    if isinstance(module, FUSED_NORMS):
        added, chosen = isinstance(module, _BatchNormAddAct), isinstance(module, _Chosen)
        return _convert(module, _SYNCHRONISED[added, chosen], process_group)
    if isinstance(module, _BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        module.add_module(name, convert_sync_batchnorm(child, process_group))
    return module


_SYNCHRONISED: dict[tuple[bool, bool], type[nn.SyncBatchNorm]] = {
    (False, False): SyncBatchNormReLU,
    (True, False): SyncBatchNormAddReLU,
    (False, True): SyncBatchNormAct,
    (True, True): SyncBatchNormAddAct,
}


def _convert(module: _BatchNorm, kind: type[nn.SyncBatchNorm], process_group: Any) -> nn.SyncBatchNorm:
    converted = kind(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, process_group
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
        setattr(converted, name, getattr(module, name))
    if isinstance(module, _Chosen):
        converted.activation = module.activation
    return converted
