"""What the rivals share: one signature, the check of a call, and the two ways to say no."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

# Where the rivals run. Stand-ins for them run on the CPU.
DEVICE = "cuda"

LAYOUTS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


class Unavailable(RuntimeError):  # noqa: N818
    """The library cannot be imported, or finds no GPU."""


class Unsupported(RuntimeError):  # noqa: N818
    """The library has no such form, dtype, layout, mode or shape."""


@dataclass(frozen=True)
class Call:
    """One call of a form: ``residual`` is None for norm+relu."""

    input: Tensor
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float

    @property
    def activations(self) -> dict[str, Tensor]:
        return {"input": self.input} | ({} if self.residual is None else {"residual": self.residual})

    @property
    def vectors(self) -> dict[str, Tensor]:
        named = {
            "weight": self.weight, "bias": self.bias, "running_mean": self.running_mean, "running_var": self.running_var
        }  # fmt: skip
        return {name: vector for name, vector in named.items() if vector is not None}

    @property
    def differentiated(self) -> bool:
        tensors = (*self.activations.values(), *self.vectors.values())
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class Library(ABC):
    """The functions of ``resfused.reference``. Every one raises ``Unsupported`` for what the library does not take."""

    name: ClassVar[str]
    dtypes: ClassVar[dict[torch.dtype, int]]
    """What the number of channels must be a multiple of, by dtype of the activations."""
    layout: ClassVar[torch.memory_format]
    evaluates: ClassVar[bool]
    """Whether it takes frozen statistics, without gradients."""
    needs_statistics: ClassVar[bool] = False

    def __init__(self) -> None:
        if DEVICE == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"{self.name} needs a CUDA GPU, and torch sees none")

    def batch_norm_relu(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """relu(batch_norm(input))"""
        return self._run(Call(input, None, running_mean, running_var, weight, bias, training, momentum, eps))

    def batch_norm_add_relu(
        self,
        input: Tensor,
        residual: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """relu(batch_norm(input) + residual)"""
        return self._run(Call(input, residual, running_mean, running_var, weight, bias, training, momentum, eps))

    def batch_norm_add_batch_norm_relu(
        self,
        input: Tensor,
        residual: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual_running_mean: Tensor | None,
        residual_running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual_weight: Tensor | None = None,
        residual_bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        residual_momentum: float = 0.1,
        residual_eps: float = 1e-5,
    ) -> Tensor:
        """relu(batch_norm(input) + batch_norm(residual)): no rival has it."""
        raise Unsupported(f"{self.name} normalises one input; norm+add(norm)+relu has two")

    @abstractmethod
    def run(self, call: Call) -> Tensor:
        """A call that passed ``refusals``."""

    def refusals(self, call: Call) -> Iterator[str]:
        """Why the library does not take the call; each reason may rest on those before it not holding."""
        x = call.input
        if x.device.type != DEVICE:
            yield f"input is on {x.device}, not on {DEVICE}"
        if x.dtype not in self.dtypes:
            yield f"input is {x.dtype}; it takes {', '.join(map(str, self.dtypes))}"
        if x.dim() != 4 or x.numel() == 0:
            yield f"input has the shape {tuple(x.shape)}; it takes (N, C, H, W), not empty"
        if x.shape[1] % self.dtypes[x.dtype]:
            yield f"input has {x.shape[1]} channels; it takes multiples of {self.dtypes[x.dtype]} in {x.dtype}"
        yield from self._activation_refusals(call)
        yield from self._vector_refusals(call)
        if not call.training and not self.evaluates:
            yield "it takes training statistics only"
        if not call.training and call.differentiated:
            yield "it has no gradients through frozen statistics"

    def _activation_refusals(self, call: Call) -> Iterator[str]:
        x = call.input
        for name, t in call.activations.items():
            if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device):
                yield f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}, unlike input"
            if not t.is_contiguous(memory_format=self.layout):
                yield f"{name} has the strides {t.stride()}; it takes {LAYOUTS[self.layout]}"

    def _vector_refusals(self, call: Call) -> Iterator[str]:
        if call.weight is None or call.bias is None:
            yield "it needs weight and bias"
        if (call.running_mean is None) != (call.running_var is None):
            yield "it needs both running statistics or neither"
        if call.running_mean is None and (self.needs_statistics or not call.training):
            yield "it needs running statistics"
        for name, vector in call.vectors.items():
            if vector.dtype != torch.float32 or vector.device != call.input.device or not vector.is_contiguous():
                yield f"{name} is {vector.dtype} on {vector.device}; it takes contiguous float32 beside input"

    def _run(self, call: Call) -> Tensor:
        if reason := next(self.refusals(call), None):
            raise Unsupported(f"{self.name}: {reason}")
        return self.run(call)


def imported(module: str, package: str) -> Any:
    """The module; ``Unavailable``, naming the package that has it, where its import fails in whatever way."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Unavailable(f"{package} cannot be imported: {type(error).__name__}: {error}") from error
