"""The kernels called on plain tensors, straight from a checked call: dense vectors, the device, running statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backend import require_kernels
from ..kernels.activation import Activation
from ..kernels.call import Gradients, Kept, Norm

_NOWHERE: AbstractContextManager[None] = nullcontext()
_PLAIN = frozenset((Tensor, Parameter))
_is_like_a_subclass = torch._C._dispatch_isTensorSubclassLike


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but the kernels has a say in a call on them, so that the dispatcher need not be asked.

    It has where something traces, observes or profiles, and where a tensor is not just its memory: fake, functional,
    batched, a subclass, lazily negated or zero.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    given = [t for t in tensors if t is not None]
    return _PLAIN.issuperset(map(type, given)) and not (
        any(map(_is_like_a_subclass, given)) or any(map(Tensor.is_neg, given)) or any(map(Tensor._is_zerotensor, given))
    )


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    training: bool,
    masked: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The kernels' ``forward`` for vectors that need not be dense, with running statistics that may be shared."""
    kernels = require_kernels(x)
    if not training:
        with on_device_of(x):
            return kernels.forward(x, residual, prepared(norm), prepared(residual_norm), False, masked, activation)
    if residual_norm is not None and _share_statistics(norm, residual_norm):
        return _forward_in_turn(x, residual, norm, residual_norm, activation, masked)
    used, residual_used = prepared(norm), prepared(residual_norm)
    with on_device_of(x):
        results = kernels.forward(x, residual, used, residual_used, True, masked, activation)
    _write_back(norm, used)
    if residual_norm is not None:
        _write_back(residual_norm, residual_used)
    return results


def normalise(
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """The kernels' ``normalise`` for vectors that need not be dense."""
    with on_device_of(x):
        return require_kernels(x).normalise(
            x, residual, stats, prepared(norm), prepared(residual_norm), masked, activation
        )


def backward(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> Gradients:
    """The kernels' ``backward`` for vectors that need not be dense."""
    norm, residual_norm = prepared(kept.norm), prepared(kept.residual_norm)
    if norm is not kept.norm or residual_norm is not kept.residual_norm:
        kept = kept._replace(norm=norm, residual_norm=residual_norm)
    with on_device_of(dy):
        return require_kernels(dy).backward(dy, dy_fork, kept, wanted)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """In it ``x``'s device is the current one."""
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        return _NOWHERE
    return torch.cuda.device_of(x)


def prepared(norm: Norm | None) -> Any:
    """The norm itself where its vectors are contiguous and its numbers floats, else one where they are."""
    if norm is None:
        return None
    weight, bias, mean, var, momentum, eps = norm
    if (
        type(momentum) is float
        and type(eps) is float
        and (weight is None or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
        and (mean is None or mean.is_contiguous())
        and (var is None or var.is_contiguous())
    ):
        return norm
    return Norm(*(None if t is None else t.contiguous() for t in norm[:4]), float(momentum), float(cast(float, eps)))


def _write_back(norm: Norm, used: Norm) -> None:
    """Running statistics that were updated in a contiguous copy, and what autograd must know of the others."""
    for buffer, new in ((norm.running_mean, used.running_mean), (norm.running_var, used.running_var)):
        if buffer is None or new is None:
            continue
        if buffer is new:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(new)


def _share_statistics(norm: Norm, residual_norm: Norm) -> bool:
    """Whether running statistics of the one norm and of the other may lie in the same memory."""
    own = _addresses(norm.running_mean, norm.running_var)
    others = _addresses(residual_norm.running_mean, residual_norm.running_var)
    return any(start < other_end and other < end for start, end in own for other, other_end in others)


def _addresses(*vectors: Tensor | None) -> list[tuple[int, int]]:
    """Of the first byte of each, and of the one after its last."""
    return [(address := v.data_ptr(), address + _extent(v)) for v in vectors if v is not None]


def _extent(vector: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if vector.is_contiguous():
        return vector.nbytes
    steps = sum((n - 1) * stride for n, stride in zip(vector.shape, vector.stride(), strict=True))
    return (steps + 1) * vector.element_size()


def _forward_in_turn(
    x: Tensor, residual: Tensor | None, norm: Norm, residual_norm: Norm, activation: Activation, masked: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of two norms that share running statistics, which one launch for both would update in a race.

    It takes the batch's alone, with a momentum of one; the updates follow, one after the other as in eager.
    """
    own, other = _of_the_batch(norm), _of_the_batch(residual_norm)
    results = forward(x, residual, own, other, activation, True, masked)
    for given, batch in ((norm, own), (residual_norm, other)):
        for running, new in ((given.running_mean, batch.running_mean), (given.running_var, batch.running_var)):
            if running is not None and new is not None:
                running.copy_(running * (1 - given.momentum) + new * given.momentum)
    return results


def _of_the_batch(norm: Norm) -> Norm:
    """With room for the batch's statistics in place of the running ones."""

    def room(vector: Tensor | None) -> Tensor | None:
        if vector is None:
            return None
        return torch.zeros_like(vector, dtype=torch.promote_types(vector.dtype, torch.float32))

    return norm._replace(running_mean=room(norm.running_mean), running_var=room(norm.running_var), momentum=1.0)
