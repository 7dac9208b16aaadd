"""One direction of a node through the kernels' own functions: its tensors, what it must give, its time under tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from measure import timing
from resfused.kernels import gpu
from resfused.kernels.geometry import Geometry, geometry
from resfused.kernels.gpu import launch_table
from torch import Tensor
from workloads.gate import FACTOR, LEAST, relative_error
from workloads.nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU, Node
from workloads.problems import DTYPES, LAYOUTS, Problem, problem

from resfused import reference

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Case:
    """``direction``: "forward" or "backward", in training, with every gradient that there is wanted."""

    direction: str
    node: Node
    batch: int
    dtype: str
    layout: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.node.channels, self.node.height, self.node.width

    @cached_property
    def geometry(self) -> Geometry:
        return geometry(torch.empty(self.shape, device="meta", memory_format=LAYOUTS[self.layout]))

    def tensors(self, device: torch.device) -> Direction:
        p = problem(self.node.form, self.shape, DTYPES[self.dtype], self.layout, device)
        forward = Direction(p, None, None, None)
        if self.direction == "forward":
            return forward
        with torch.no_grad():
            _, mask, stats = forward.forward()
        return Direction(p, torch.empty_like(p.dy).normal_() if self.node.forked else None, mask, stats)

    @property
    def set_bytes(self) -> int:
        """Of the activations that one set of tensors holds."""
        held = 1 + (self.node.form != NORM_RELU) + (self.direction == "backward") * (1 + self.node.forked)
        return held * self.batch * self.node.elements * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Direction:
    """The tensors of a case: with ``stats``, which the forward returned, those of its backward."""

    problem: Problem
    dy_fork: Tensor | None
    mask: Tensor | None
    stats: Tensor | None

    def forward(self) -> Any:
        """(y, mask, stats)"""
        x, *residual = self.problem.activations
        masked = self.problem.form == NORM_ADD_RELU
        return gpu.forward(x, residual[0] if residual else None, *self._norms(), training=True, masked=masked)

    def run(self) -> Any:
        """What is timed."""
        return self.forward() if self.stats is None else self._backward()

    def _backward(self) -> Any:
        x, *residual = self.problem.activations
        normed = self.problem.form == NORM_ADD_NORM_RELU
        wanted = gpu.Gradients(True, len(residual) > 0, True, True, normed, normed)
        dtype = x.dtype if self.problem.form == NORM_ADD_RELU else None
        kept = gpu.Kept(x, None, residual[0] if normed else None, dtype, self.mask, self.stats, *self._norms())
        return gpu.backward(self.problem.dy, self.dy_fork, kept, wanted)

    def _norms(self) -> list[Any]:
        p = self.problem
        norms = [
            gpu.Norm(*p.parameters[i : i + 2], *p.running[i : i + 2], momentum=MOMENTUM, eps=EPS)
            for i in range(0, len(p.parameters), 2)
        ]
        return norms if len(norms) == 2 else [*norms, None]

    def results(self) -> dict[str, Tensor]:
        """Everything that it gives, by name; the running statistics that it updates are copies."""
        p = replace(self.problem, running=[t.clone() for t in self.problem.running])
        given = replace(self, problem=p).run()
        if self.stats is not None:
            gradients = [g for g in given if g is not None]
            return {f"gradient {i}": g for i, g in enumerate(gradients)}
        y, mask, _ = given
        found = {"output": y} | {f"running statistic {i}": t for i, t in enumerate(p.running)}
        return found if mask is None else found | {"mask": gpu.unpack_mask(mask, y).to(y.dtype)}

    def exact(self) -> dict[str, Tensor]:
        """The same in float64, by PyTorch."""
        p = self.problem.copy(torch.float64)
        if self.stats is not None:
            dy = p.dy if self.dy_fork is None else p.dy + self.dy_fork.double()
            p = replace(p, dy=dy)
            return {f"gradient {i}": g for i, g in enumerate(p.backward(p.forward(reference)))}
        with torch.no_grad():
            y = p.forward(reference)
        found = {"output": y} | {f"running statistic {i}": t for i, t in enumerate(p.running)}
        return found | ({"mask": (y > 0).double()} if p.form == NORM_ADD_RELU else {})


def fault(results: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with the results of activations of ``dtype``; None where all are as near as rounding lets them.

    The limit is the gate's, with the error of the exact result rounded once in the place of eager's.
    """
    if results.keys() != exact.keys():
        return f"gives {', '.join(results)}, not {', '.join(exact)}"
    for name, value in exact.items():
        error = relative_error(results[name], value)
        rounding = relative_error(value.to(results[name].dtype), value)
        limit = max(FACTOR * rounding, LEAST[dtype])
        if not error <= limit:
            return f"wrong {name}: {error:.1e} from float64, where {limit:.1e} is the limit"
    return None


@dataclass(frozen=True)
class Measured:
    """Median milliseconds by variant, and why others have none."""

    medians: dict[str, float]
    dropped: dict[str, str]


def measure(case: Case, variants: dict[str, Any], repetitions: int, device: torch.device) -> Measured:
    """Every variant, a table by name, in turn on the same tensors, those that pass the comparison with float64."""
    torch.manual_seed(0)
    first = case.tensors(device)
    dropped = _faults(first, variants, DTYPES[case.dtype])
    timed = {name: table for name, table in variants.items() if name not in dropped}
    needed = timing.rotation(case.set_bytes, repetitions * max(1, len(timed)), device)
    sets = [first, *(case.tensors(device) for _ in range(needed - 1))]
    calls = {name: [_under(table, each) for each in sets] for name, table in timed.items()}
    samples = timing.interleaved(calls, repetitions, device)
    return Measured({name: median(each) for name, each in samples.items()}, dropped)


def _faults(tensors: Direction, variants: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    exact = tensors.exact()
    found = {}
    for name, table in variants.items():
        # Whatever a compiler, a driver or a kernel has against a table, the others can still be measured.
        try:
            with launch_table.using(**table.constants):
                reason = fault(tensors.results(), exact, dtype)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            found[name] = reason
    return found


def _under(table: Any, tensors: Direction) -> Callable[[], object]:
    """The direction with another launch table in force; its choice is made anew, on the host, ahead of the GPU."""
    constants = table.constants

    def call() -> None:
        with launch_table.using(**constants):
            tensors.run()

    return call
