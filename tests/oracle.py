"""Problems for the three forms, run by any implementation in any precision, and the comparison of what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from resfused.kernels.activation import IDENTITY, RELU, Activation
from torch import Tensor

import resfused
from resfused import reference

FORMS = ("norm+relu", "norm+add+relu", "norm+add(norm)+relu")
STATISTICS = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")
PARAMETERS = ("weight", "bias", "residual_weight", "residual_bias")
LAYOUTS = ("contiguous", "channels_last")
# With two values a channel x̂ is ±1 but for eps, and dx what cancellation leaves, about eps / var: not too small an eps.
NUMBERS = {"momentum": 0.3, "eps": 0.1}
# Normwise, against float64: rounding of inputs and of a sum over one channel.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Problem:
    """One call of a form: its tensors by name, its numbers, the gradient of its output."""

    form: str
    tensors: dict[str, Tensor | None]
    dy: Tensor
    training: bool = True
    numbers: dict[str, float] = field(default_factory=NUMBERS.copy)
    wanted: tuple[str, ...] = ("input", "residual", *PARAMETERS)
    activation: Activation = RELU

    def with_(self, **tensors: Tensor | None) -> Problem:
        return replace(self, tensors={**self.tensors, **tensors})


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous" or x.dim() < 3:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def problem(
    form: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    training: bool = True,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
) -> Problem:
    """Random tensors of every kind that the form takes."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    vectors = parameter_dtype or (torch.float32 if narrow else dtype)

    def activation(scale: float, shift: float) -> Tensor:
        return in_layout((torch.randn(shape, dtype=torch.float64) * scale + shift).to(device, dtype), layout)

    def vector(shift: float, spread: float) -> Tensor:
        return (torch.rand(shape[1], dtype=torch.float64) * spread + shift).to(device, vectors)

    def norm(prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}weight": vector(-1.0, 2.0),
            f"{prefix}bias": vector(-0.5, 1.0),
            f"{prefix}running_mean": vector(-1.0, 2.0),
            f"{prefix}running_var": vector(0.5, 1.0),
        }

    tensors: dict[str, Tensor | None] = {"input": activation(2.0, 0.5), **norm("")}
    if form != "norm+relu":
        tensors["residual"] = activation(1.0, 0.0)
    if form == "norm+add(norm)+relu":
        tensors |= norm("residual_")
    return Problem(form, tensors, activation(1.0, 0.0), training)


def run(implementation: ModuleType, p: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one call; every tensor in ``dtype`` where it is given."""

    def own(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if name in STATISTICS:
            return tensor.detach().to(dtype or tensor.dtype, copy=True)
        # Not a copy: strides and alignment are part of the problem.
        leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        return leaf.requires_grad_(name in p.wanted) if leaf is not tensor else leaf

    t = {name: own(name, tensor) for name, tensor in p.tensors.items()}
    y = call(implementation, p, t)
    results = {"output": y.detach()}
    leaves = {n: v for n, v in t.items() if v is not None and v.requires_grad}
    if leaves:
        gradients = torch.autograd.grad(y, list(leaves.values()), p.dy.to(y.dtype) if dtype else p.dy)
        results |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results | {name: v for name, v in t.items() if name in STATISTICS and v is not None}


def call(implementation: ModuleType, p: Problem, t: dict[str, Tensor | None]) -> Tensor:
    get = t.get
    own = (get("weight"), get("bias"))
    if p.activation != RELU:
        return _call_with_activation(implementation, p, t)
    if p.form == "norm+relu":
        return implementation.batch_norm_relu(
            t["input"], get("running_mean"), get("running_var"), *own, p.training, **p.numbers
        )
    if p.form == "norm+add+relu":
        return implementation.batch_norm_add_relu(
            t["input"], t["residual"], get("running_mean"), get("running_var"), *own, p.training, **p.numbers
        )
    numbers = {f"residual_{name}": value * 1.5 for name, value in p.numbers.items()}
    return implementation.batch_norm_add_batch_norm_relu(
        t["input"], t["residual"], *map(get, STATISTICS), *own, get("residual_weight"), get("residual_bias"),
        p.training, **p.numbers, **numbers,
    )  # fmt: skip


def _call_with_activation(implementation: ModuleType, p: Problem, t: dict[str, Tensor | None]) -> Tensor:
    get = t.get
    own = (get("weight"), get("bias"))
    if p.form != "norm+add(norm)+relu":
        return implementation.batch_norm_act(
            t["input"], get("running_mean"), get("running_var"), *own, p.training, **p.numbers,
            activation=p.activation, residual=get("residual"),
        )  # fmt: skip
    numbers = {f"residual_{name}": value * 1.5 for name, value in p.numbers.items()}
    return implementation.batch_norm_add_batch_norm_act(
        t["input"], t["residual"], *map(get, STATISTICS), *own, get("residual_weight"), get("residual_bias"),
        p.training, **p.numbers, **numbers, activation=p.activation,
    )  # fmt: skip


def kernels_in_force() -> str:
    """The backend that a test must run: the one it forces, or else Triton's kernels."""
    return "triton" if resfused.get_backend() == "auto" else resfused.get_backend()


def pre_activation(p: Problem) -> Tensor:
    """z, what the activation is taken of, in float64."""
    return run(reference, replace(p, activation=IDENTITY), torch.float64)["output"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite where NaN or Inf do not stand at the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    finite = expected.isfinite()
    if not torch.equal(actual.isnan(), expected.isnan()) or not torch.equal(
        actual.nan_to_num(nan=0.0).where(~finite, 0), expected.nan_to_num(nan=0.0).where(~finite, 0)
    ):
        return float("inf")
    difference = (actual - expected).where(finite, 0).norm()
    scale = expected.where(finite, 0).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor by name, normwise; the message lists each that is off."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"
