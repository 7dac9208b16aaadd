"""The tensors of one node, and the node computed by the fused functions or by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resfused import reference
from workloads.nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """One node's activations, vectors over channels (parameters and running statistics), and output gradient."""

    form: str
    training: bool
    activations: list[Tensor]
    running: list[Tensor]
    parameters: list[Tensor]
    dy: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """What the node is differentiated by."""
        return [*self.activations, *self.parameters]

    def forward(self, library: Any) -> Tensor:
        """``library``: ``resfused.functional`` or ``resfused.reference``, or what has their functions."""
        x, *residual = self.activations
        if self.form == NORM_RELU:
            return library.batch_norm_relu(x, *self.running, *self.parameters, self.training)
        if self.form == NORM_ADD_RELU:
            return library.batch_norm_add_relu(x, *residual, *self.running, *self.parameters, self.training)
        return library.batch_norm_add_batch_norm_relu(x, *residual, *self.running, *self.parameters, self.training)

    def backward(self, y: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.inputs, self.dy, retain_graph=retain_graph)

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """The same problem with tensors of its own, in another precision where ``dtype`` is given."""

        def copies(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors]

        lists = copies(self.activations), copies(self.running), copies(self.parameters)
        return Problem(self.form, self.training, *lists, *copies([self.dy]))

    def undecided(self, within: float) -> Tensor:
        """Where the ReLU is taken of less than ``within``, so that rounding decides whether it lets through."""
        p = self.copy(torch.float64)
        with torch.no_grad():
            p.parameters[1] -= within
            passes_below = p.forward(reference) > 0
            p.parameters[1] += 2 * within
            return passes_below != (p.forward(reference) > 0)

    def results(self, library: Any) -> dict[str, Tensor]:
        """Output, gradients and running statistics by name."""
        y = self.forward(library)
        results = {"output": y.detach()}
        if self.training:
            results |= {f"gradient {i}": g for i, g in enumerate(self.backward(y))}
            results |= {f"running statistic {i}": s for i, s in enumerate(self.running)}
        return results


def problem(
    form: str, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, training: bool = True
) -> Problem:
    """Random tensors; vectors in float32 (float64 for float64), everything differentiable with ``training``."""
    norms = 2 if form == NORM_ADD_NORM_RELU else 1
    vectors = torch.promote_types(dtype, torch.float32)

    def activation() -> Tensor:
        # A CPU fills strided memory ten times slower.
        return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])

    def vector(least: float) -> Tensor:
        return torch.empty(shape[1], dtype=vectors, device=device).uniform_(least, least + 1)

    activations = [activation() for _ in range(1 if form == NORM_RELU else 2)]
    running = [vector(least) for _ in range(norms) for least in (-0.5, 0.5)]
    parameters = [vector(least) for _ in range(norms) for least in (0.5, -0.5)]
    for t in (*activations, *parameters):
        t.requires_grad_(training)
    return Problem(form, training, activations, running, parameters, activation())
