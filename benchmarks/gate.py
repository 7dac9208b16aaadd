"""The correctness gate: nothing is timed before the kernels have been compared with PyTorch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from nodes import FORMS
from problems import LAYOUTS, Problem, problem
from progress import track
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resfused import backend_for, functional, reference

# Of eager's own error. Where eager rounds as rarely as we do, the least limit decides.
FACTOR = 2.0
LEAST = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# Of another library it is asked whether it computes the same function, in a precision that is its own affair.
LEAST_OF_OTHERS = {dtype: 10 * least for dtype, least in LEAST.items()}
# (N, C, H, W): each has a ragged tile in some axis; together they fit the interpreter in seconds.
SHAPES = ((4, 64, 8, 8), (2, 130, 7, 7))


@dataclass(frozen=True)
class Verdict:
    """The result of one node that comes nearest to its limit: ||ours - exact|| / ||exact||, and eager's."""

    form: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    training: bool
    worst: str
    error: float
    eager_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def judge(p: Problem, layout: str, library: object = functional) -> Verdict:
    """A library, ours or another, and eager against float64 on the same inputs: output, gradients, running statistics.

    Raises: RuntimeError where ours would not run the kernels.
    """
    x = p.activations[0]
    if library is functional and backend_for(x) != "triton":
        raise RuntimeError(f"the gate judges the kernels, and a tensor on {x.device} does not take them")
    exact = p.copy(torch.float64).results(reference)
    ours, eager = p.copy().results(library), p.copy().results(reference)
    least = LEAST if library is functional else LEAST_OF_OTHERS

    def verdict(name: str) -> Verdict:
        eager_error = relative_error(eager[name], exact[name])
        limit = max(FACTOR * eager_error, least[x.dtype])
        dtype = str(x.dtype).removeprefix("torch.")
        error = relative_error(ours[name], exact[name])
        return Verdict(p.form, layout, dtype, tuple(x.shape), p.training, name, error, eager_error, limit)

    return max(map(verdict, exact), key=lambda v: v.error / v.limit)


def run_gate(device: torch.device, dtypes: list[torch.dtype], console: Console) -> list[Verdict]:
    """A verdict for every form, layout, dtype and mode, printed as a table."""
    torch.manual_seed(0)
    cases = list(product(FORMS, LAYOUTS, dtypes, (True, False), SHAPES))
    verdicts = [
        judge(problem(form, shape, dtype, layout, device, training), layout)
        for form, layout, dtype, training, shape in track(cases, "Correctness", console=console)
    ]
    console.print(_table(verdicts))
    return verdicts


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Infinite for NaN: nothing wrong may compare as small."""
    error = float((actual.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _table(verdicts: list[Verdict]) -> Table:
    """The worst verdict of each form and dtype."""
    table = Table(title="Correctness against float64: the result nearest to its limit")
    for header in ("form", "dtype", "layout", "shape", "mode", "result"):
        table.add_column(header)
    for header in ("ours", "eager", "limit"):
        table.add_column(header, justify="right")
    table.add_column("")
    groups: dict[tuple[str, str], Verdict] = {}
    for v in verdicts:
        key = v.form, v.dtype
        groups[key] = max(groups.get(key, v), v, key=lambda w: w.error / w.limit)
    for v in groups.values():
        mode = "training" if v.training else "eval"
        numbers = (f"{v.error:.1e}", f"{v.eager_error:.1e}", f"{v.limit:.1e}")
        outcome = "[green]ok" if v.passed else "[red]WRONG"
        table.add_row(v.form, v.dtype, v.layout, "x".join(map(str, v.shape)), mode, v.worst, *numbers, outcome)
    return table
