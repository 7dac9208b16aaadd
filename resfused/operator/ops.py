"""The kernels as operators of the dispatcher, so that torch.compile, fake tensors and export see through them.

They know nothing of autograd: ``FusedResidualBlock`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..backend import require_kernels
from .packed import Affine, Differentiable, Norms, affine_of, own_norm, second_norm, tensors, with_tensors

_NORM = (
    "Tensor? {0}weight, Tensor? {0}bias, Tensor{1}? {0}running_mean, Tensor{2}? {0}running_var, "
    "float {0}momentum, float {0}eps"
)
_FROZEN = f"{_NORM.format('', '', '')}, bool norm_residual, {_NORM.format('residual_', '', '')}"
_TRAINED = f"{_NORM.format('', '(a!)', '(b!)')}, bool norm_residual, {_NORM.format('residual_', '(c!)', '(d!)')}"
_AFFINE = "Tensor? weight, Tensor? bias, bool norm_residual, Tensor? residual_weight, Tensor? residual_bias"
_SCHEMAS = (
    f"forward_training(Tensor x, Tensor? residual, {_TRAINED}, bool save_mask)"
    " -> (Tensor y, Tensor mask, Tensor stats)",
    f"forward_frozen(Tensor x, Tensor? residual, {_FROZEN}, bool save_mask) -> (Tensor y, Tensor mask)",
    "backward(Tensor dy, Tensor? dy_fork, Tensor x, Tensor? residual, ScalarType? residual_dtype, Tensor? mask, "
    f"Tensor? stats, {_FROZEN}, bool[6] wanted) -> Tensor[]",
    # The phases of a training node on their own, for statistics over several processes.
    "local_statistics(Tensor x, Tensor? residual, bool norm_residual) -> Tensor",
    f"normalise(Tensor x, Tensor? residual, Tensor stats, {_AFFINE}) -> (Tensor y, Tensor mask)",
    "local_sums(Tensor dy, Tensor? dy_fork, Tensor x, Tensor? residual, ScalarType? residual_dtype, Tensor mask, "
    f"Tensor stats, {_AFFINE}, bool[5] wanted) -> Tensor[]",
    "input_gradients(Tensor dy, Tensor? dy_fork, Tensor? dz, Tensor x, Tensor? residual, Tensor mask, Tensor stats, "
    f"Tensor means, {_AFFINE}, bool[2] wanted) -> Tensor[]",
)


def _norms_of(kernels: Any, norms: Norms) -> tuple[Any, Any]:
    """The kernels' (Norm, Norm or None), with dense vectors."""
    dense = with_tensors(norms, [None if t is None else t.contiguous() for t in tensors(norms)])
    second = second_norm(dense)
    return kernels.Norm(*own_norm(dense)), None if second is None else kernels.Norm(*second)


def _affine_norms(kernels: Any, affine: Affine) -> tuple[Any, Any]:
    """The same for kernels that are given the statistics."""
    return _norms_of(kernels, Norms()._replace(**affine._asdict()))


def _write_back(norms: Norms, used: tuple[Any, Any]) -> None:
    """Running statistics that were updated in a contiguous copy, and what autograd must know of the others."""
    given = (
        norms.running_mean, norms.running_var, norms.residual_running_mean, norms.residual_running_var
    )  # fmt: skip
    updated = [buffer for norm in used if norm is not None for buffer in (norm.running_mean, norm.running_var)]
    for buffer, new in zip(given, updated, strict=False):
        if buffer is None:
            continue
        if buffer is new:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(new)


def _or_empty(mask: Tensor | None, x: Tensor) -> Tensor:
    """An operator returns a tensor whether there is a mask or not."""
    return x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *values, save_mask = rest
    norms = Norms(*values)
    if _share_statistics(norms):
        return _forward_training_in_turn(x, residual, norms, save_mask)
    kernels = require_kernels(x)
    used = _norms_of(kernels, norms)
    with torch.cuda.device_of(x):
        y, mask, stats = kernels.forward(x, residual, *used, True, save_mask)
    _write_back(norms, used)
    return y, _or_empty(mask, x), stats


def _share_statistics(norms: Norms) -> bool:
    """Whether running statistics of the one norm and of the other may lie in the same memory."""
    if not norms.norm_residual:
        return False
    own = _addresses(norms.running_mean, norms.running_var)
    others = _addresses(norms.residual_running_mean, norms.residual_running_var)
    return any(start < other_end and other < end for start, end in own for other, other_end in others)


def _addresses(*vectors: Tensor | None) -> list[tuple[int, int]]:
    """Of the first byte of each, and of the one after its last."""
    return [(v.data_ptr(), v.data_ptr() + _extent(v)) for v in vectors if v is not None]


def _extent(vector: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if vector.is_contiguous():
        return vector.nbytes
    steps = sum((n - 1) * stride for n, stride in zip(vector.shape, vector.stride(), strict=True))
    return (steps + 1) * vector.element_size()


def _forward_training_in_turn(
    x: Tensor, residual: Tensor | None, norms: Norms, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two norms that share running statistics, which one launch for both would update in a race.

    It takes the batch's alone, with a momentum of one; the updates follow, one after the other as in eager.
    """
    batch: dict[str, Any] = {
        name: torch.zeros_like(vector, dtype=torch.promote_types(vector.dtype, torch.float32))
        for name, vector in norms._asdict().items()
        if name.endswith(("running_mean", "running_var"))
    }
    alone = norms._replace(**batch, momentum=1.0, residual_momentum=1.0)
    results = _forward_training(x, residual, *alone, save_mask)
    for name, new in batch.items():
        running = getattr(norms, name)
        momentum = norms.residual_momentum if name.startswith("residual") else norms.momentum
        running.copy_(running * (1 - momentum) + new * momentum)
    return results


def _forward_frozen(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, save_mask = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        y, mask, _ = kernels.forward(x, residual, *_norms_of(kernels, Norms(*values)), False, save_mask)
    return y, _or_empty(mask, x)


def _backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    kernels = require_kernels(x)
    norms = _norms_of(kernels, Norms(*values))
    with torch.cuda.device_of(x):
        gradients = kernels.backward(
            dy, dy_fork, x, residual, residual_dtype, mask, stats, *norms, kernels.Gradients(*wanted)
        )
    return [g for g in gradients if g is not None]


def _local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    with torch.cuda.device_of(x):
        return require_kernels(x).local_statistics(x, residual, norm_residual)


def _normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        y, mask = kernels.normalise(x, residual, stats, *_affine_norms(kernels, Affine(*affine)))
    return y, _or_empty(mask, x)


def _local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        sums, gradients = kernels.local_sums(
            dy, dy_fork, x, residual, residual_dtype, mask if mask.numel() else None, stats,
            *_affine_norms(kernels, Affine(*affine)), kernels.Gradients(False, *wanted),
        )  # fmt: skip
    return [sums, *(g for g in gradients if g is not None)]


def _input_gradients(
    dy: Tensor,
    dy_fork: Tensor | None,
    dz: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    stats: Tensor,
    means: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        gradients = kernels.input_gradients(
            dy, dy_fork, dz, x, residual, mask if mask.numel() else None, stats, means,
            *_affine_norms(kernels, Affine(*affine)), wanted,
        )  # fmt: skip
    return [g for g in gradients if g is not None]


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, save_mask = rest
    return _fake_outputs(x, residual, save_mask and residual is not None and not Norms(*values).norm_residual)


def _fake_outputs(x: Tensor, residual: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    kernels = require_kernels(x)
    dense = kernels.dense(x)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = x.new_empty(kernels.geometry(dense).mask_numel if masked else 0, dtype=torch.uint8)
    return torch.empty_like(dense, dtype=dtype), mask


def _fake_forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mask = _fake_forward(x, residual, *rest)
    rows = 4 if Norms(*rest[:-1]).norm_residual else 2
    stats = x.new_empty((rows, x.shape[1]), dtype=require_kernels(x).accumulator(x, residual))
    return y, mask, stats


def _fake_backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    want = Differentiable(*wanted)
    dense = require_kernels(x).dense(x)
    dtype = residual_dtype if residual is None else residual.dtype
    dx = [torch.empty_like(dense)] if want.input else []
    dresidual = [torch.empty_like(dense, dtype=dtype)] if want.residual else []
    return [*dx, *dresidual, *_fake_parameter_gradients(affine_of(Norms(*values)), wanted[2:])]


def _fake_parameter_gradients(affine: Affine, wanted: Sequence[bool]) -> list[Tensor]:
    parameters = affine.weight, affine.bias, affine.residual_weight, affine.residual_bias
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, want in zip(parameters, wanted, strict=True)
        if want and p is not None
    ]


def _fake_local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    accumulator = require_kernels(x).accumulator(x, residual)
    return x.new_empty((4 if norm_residual else 2, x.shape[1]), dtype=accumulator)


def _fake_normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, residual, residual is not None and not Affine(*affine).norm_residual)


def _fake_local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    affine = Affine(*values)
    kernels = require_kernels(x)
    rows = 3 if affine.norm_residual else 2
    sums = x.new_empty((rows, x.shape[1]), dtype=kernels.accumulator(x, residual, dy))
    dz = [torch.empty_like(kernels.dense(x), dtype=residual_dtype)] if wanted[0] and not affine.norm_residual else []
    return [sums, *dz, *_fake_parameter_gradients(affine, wanted[1:])]


def _fake_input_gradients(
    dy: Tensor, dy_fork: Tensor | None, dz: Tensor | None, x: Tensor, residual: Tensor | None, *rest: Any
) -> list[Tensor]:
    dense = require_kernels(x).dense(x)
    return [
        torch.empty_like(dense, dtype=t.dtype)
        for t, want in zip((x, residual), rest[-1], strict=True)
        if want and t is not None
    ]


_library = torch.library.Library("resfused", "DEF")
for _schema, _kernel, _fake in zip(
    _SCHEMAS,
    (_forward_training, _forward_frozen, _backward, _local_statistics, _normalise, _local_sums, _input_gradients),
    (
        _fake_forward_training, _fake_forward, _fake_backward,
        _fake_local_statistics, _fake_normalise, _fake_local_sums, _fake_input_gradients,
    ),
    strict=True,
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"resfused::{_name}", cast(Callable[..., Any], _fake), lib=_library)

forward_training = torch.ops.resfused.forward_training.default
forward_frozen = torch.ops.resfused.forward_frozen.default
backward = torch.ops.resfused.backward.default
local_statistics = torch.ops.resfused.local_statistics.default
normalise = torch.ops.resfused.normalise.default
local_sums = torch.ops.resfused.local_sums.default
input_gradients = torch.ops.resfused.input_gradients.default
