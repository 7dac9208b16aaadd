"""The correctness gate: nothing is timed before the kernels have been compared with PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import NamedTuple

import torch
from console.progress import track
from resfused.kernels.gpu import launch_table
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resfused import backend_for, functional, reference, use_backend
from workloads.nodes import FORMS
from workloads.problems import DTYPES, LAYOUTS, Problem, Shape, problem

# Of eager's own error. Where eager rounds as rarely as we do, the least limit decides.
FACTOR = 2.0
LEAST = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# Of another library it is asked whether it computes the same function, in a precision that is its own affair.
LEAST_OF_OTHERS = {dtype: 10 * least for dtype, least in LEAST.items()}
# Of a node's values of a few units, in the arithmetic on each dtype.
ROUNDING = {dtype: 1e-13 if dtype is torch.float64 else 1e-5 for dtype in LEAST}
# (N, C, H, W): each has a ragged tile in some axis; together they fit the interpreter in seconds.
SHAPES: tuple[Shape, ...] = ((4, 64, 8, 8), (2, 130, 7, 7))
SMALL_SHAPES: tuple[Shape, ...] = (SHAPES[0], (2, 130, 3, 3), (3, 24, 5, 3))
SHORT_STEP = 5
# The last whatever the launch table says; the others as it says.
EVAL, TRAINING, ONE_LAUNCH = MODES = ("eval", "training", "training, one launch")


class Case(NamedTuple):
    form: str
    layout: str
    dtype: torch.dtype
    mode: str
    shape: Shape


def every_case(dtypes: Iterable[torch.dtype]) -> list[Case]:
    """As the launch table says that they are launched."""
    return list(map(Case._make, product(FORMS, LAYOUTS, dtypes, (TRAINING, EVAL), SHAPES)))


def short_cases() -> list[Case]:
    """For Triton's interpreter, of all together so few that every form still meets every mode, dtype and layout."""
    every = list(product(FORMS, MODES, LAYOUTS, DTYPES.values()))
    cases = zip(every[::SHORT_STEP], cycle(SMALL_SHAPES), strict=False)
    return [Case(form, layout, dtype, mode, shape) for (form, mode, layout, dtype), shape in cases]


@dataclass(frozen=True)
class Verdict:
    """The result of one node that comes nearest to its limit: ||ours - exact|| / ||exact||, and eager's."""

    form: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    mode: str
    worst: str
    error: float
    eager_error: float
    limit: float
    raised: str = ""
    """What ours said where it gave no results."""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        found = self.raised or f"{self.worst} is off by {self.error:.1e}, over {self.limit:.1e}"
        return f"{self.case}: {found}"

    @property
    def case(self) -> str:
        return f"{self.form}, {self.dtype} {self.layout}, {'x'.join(map(str, self.shape))}, {self.mode}"


class Judge:
    """What a problem's output, gradients and running statistics are in float64, and how far off them eager's are."""

    def __init__(self, p: Problem):
        if p.training:
            # One such gradient of millions is more than all rounding together, and either value of it is right.
            p.dy[p.undecided(ROUNDING[p.dy.dtype])] = 0
        self._problem = p
        self._exact = p.copy(torch.float64).results(reference)
        self._eager = self._errors(reference)

    def verdict(self, layout: str, library: object = functional) -> Verdict:
        """Of a library, ours or another, on the same inputs. Raises: RuntimeError where ours would not run kernels."""
        p, x = self._problem, self._problem.activations[0]
        if library is functional and backend_for(x) == "torch":
            raise RuntimeError(f"the gate judges the kernels, and a tensor on {x.device} does not take them")
        least = (LEAST if library is functional else LEAST_OF_OTHERS)[x.dtype]
        errors = self._errors(library)
        limits = {name: max(FACTOR * error, least) for name, error in self._eager.items()}
        worst = max(errors, key=lambda name: errors[name] / limits[name])
        return Verdict(
            p.form, layout, str(x.dtype).removeprefix("torch."), tuple(x.shape), TRAINING if p.training else EVAL,
            worst, errors[worst], self._eager[worst], limits[worst],
        )  # fmt: skip

    def _errors(self, library: object) -> dict[str, float]:
        results = self._problem.copy().results(library)
        return {name: relative_error(results[name], exact) for name, exact in self._exact.items()}


def judge(p: Problem, layout: str) -> Verdict:
    """Of ours on one problem."""
    return Judge(p).verdict(layout)


def run_gate(device: torch.device, cases: Sequence[Case], console: Console, kernels: str) -> list[Verdict]:
    """A verdict for every case, printed as a table of ``kernels``, and a line for each that is wrong."""
    torch.manual_seed(0)
    verdicts = [_verdict(case, device) for case in track(cases, f"Correctness of {kernels}", console)]
    console.print(_table(verdicts, kernels))
    for v in verdicts:
        if not v.passed:
            console.print(f"[red]WRONG[/]: {v}", soft_wrap=True, highlight=False)
    return verdicts


def _verdict(case: Case, device: torch.device) -> Verdict:
    p = problem(case.form, case.shape, case.dtype, case.layout, device, case.mode != EVAL)
    one_launch = launch_table.using(ONE_LAUNCH_ELEMENTS=launch_table.EVERY_NODE)
    with one_launch if case.mode == ONE_LAUNCH else nullcontext():
        try:
            return replace(judge(p, case.layout), mode=case.mode)
        except Exception as error:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            least, dtype = LEAST[case.dtype], str(case.dtype).removeprefix("torch.")
            return Verdict(case.form, case.layout, dtype, case.shape, case.mode, "", math.inf, 0.0, least, said)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Infinite for NaN: nothing wrong may compare as small."""
    error = float((actual.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def interpreted_gate() -> list[Verdict]:
    """In short, of Triton's kernels on this process's CPU."""
    torch.set_num_threads(1)
    with use_backend("triton"):
        return run_gate(torch.device("cpu"), short_cases(), Console(), "Triton's kernels, interpreted")


def _table(verdicts: list[Verdict], kernels: str) -> Table:
    """Of each form and dtype how many are right, and the errors of the one that is nearest to its limit."""
    table = Table(title=f"{kernels}: errors against float64, nearest to its limit")
    for header in ("form", "dtype"):
        table.add_column(header, no_wrap=True)
    for header in ("right", "ours", "eager", "limit"):
        table.add_column(header, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.form, v.dtype), []).append(v)
    for names, group in groups.items():
        right = sum(v.passed for v in group)
        nearest = max(group, key=lambda v: v.error / v.limit)
        colour = "green" if right == len(group) else "red"
        errors = (nearest.error, nearest.eager_error, nearest.limit)
        table.add_row(*names, f"[{colour}]{right} of {len(group)}", *(f"{error:.1e}" for error in errors))
    return table
