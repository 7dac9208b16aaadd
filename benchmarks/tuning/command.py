"""Searches the launch table for the GPU at hand and writes it to the file that the kernels read, with what it gained.

Timed are the directions of ResNet-50's nodes, each through the kernels' own functions, after a comparison of the same
tensors with PyTorch in float64. One number of one entry is changed at a time; then one launch is compared with two;
then the order of the second phase and its cache hints, on and off. The largest expected gains come first, and what time
does not allow is said. A change is kept where its gain exceeds the noise of two equal measurements beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from console.arguments import UsageError, json_file, write_json
from console.progress import Progress
from console.rows import Rows
from count.offline import architecture_of
from measure.ahead import constants_of
from record.environment import environment
from resfused.kernels.gpu import launch_file
from rich.console import Console
from workloads.nodes import resnet50_nodes
from workloads.problems import LAYOUTS

from resfused.backend import require_kernels
from tuning import ahead
from tuning.directions import Case, measure
from tuning.places import NUMBERS, ONE_LAUNCH, OneLaunchLimit, Switch
from tuning.plan import DIRECTIONS, PARTS, SHORT_NODES, TILES, cases_of, plan
from tuning.search import Comparison, PresentFailsError, Search, Step, Taken, compare_cases

MEANINGLESS = "times of Triton's interpreter on a CPU, which mean nothing"


def run(args: argparse.Namespace) -> int:
    """Searches, prints and writes; 0, or 1 where nothing could be searched.

    Raises: UsageError, before anything is written, where the arguments cannot be run here.
    """
    _check(args)
    console = Console()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    require_kernels(torch.empty(1, device=device))
    session = Session(args, console, device)
    try:
        session.search_all()
    except PresentFailsError as error:
        console.print(f"[red]{error}", highlight=False)
        return 1
    finally:
        session.show()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises: UsageError where these arguments cannot be run here."""
    target = args.output or launch_file.PATH
    if not torch.cuda.is_available():
        if not args.short:
            raise UsageError("tune needs a CUDA GPU, or --short: in the interpreter a node of ResNet-50 takes hours")
        if not args.dry_run and target.resolve() == launch_file.PATH.resolve():
            raise UsageError(f"tune needs a CUDA GPU or --output: {MEANINGLESS}, do not go into the kernels' own table")
    if not args.dry_run:
        json_file(target)


class Session:
    """One search, saved after every step, so that whatever ends it leaves what it has found."""

    def __init__(self, args: argparse.Namespace, console: Console, device: torch.device):
        self._args, self._console, self._device = args, console, device
        self._end = monotonic() + 60 * args.minutes
        self._environment = environment()
        table = launch_file.read()
        self._earlier = table.tuned_on or []
        self._search = Search(table)
        layouts = list(dict.fromkeys(args.layout or LAYOUTS))
        parts = args.part or ([TILES] if args.kernel else list(PARTS))
        kernels = args.kernel or [*launch_file.STREAMING_KERNELS, *launch_file.DIRECTIONS]
        nodes, batches, numbers = resnet50_nodes(), args.batch or [256, 32], tuple(NUMBERS)
        if args.short:
            nodes, batches, numbers = SHORT_NODES, [2], NUMBERS[:1]
        cases = cases_of(nodes, batches, args.dtype, layouts)
        self._stages = plan(table, cases, layouts, parts, kernels, numbers)
        if not args.dry_run:
            self._target.parent.mkdir(parents=True, exist_ok=True)

    @property
    def _target(self) -> Path:
        return self._args.output or launch_file.PATH

    def _seconds_left(self) -> float:
        return self._end - monotonic()

    def search_all(self) -> None:
        if self._device.type == "cpu":
            self._console.print(f"[yellow]No CUDA GPU: {MEANINGLESS}.")
        with ExitStack() as stack:
            compiler = None
            if architecture := architecture_of(self._device):
                compiler = stack.enter_context(ahead.compiler(architecture, constants_of(self._device)))
            steps = sum(len(stage.steps) for stage in self._stages)
            progress = stack.enter_context(Progress(self._console, "Searching", steps))

            def compare(step: Step, variants: dict[str, Any]) -> Comparison:
                progress.detail(step.name)
                if compiler and self._search.has_changed(step.entry):
                    self._compile(compiler, [step])
                return self._compare(step, variants)

            def after_each(step: Step) -> None:
                progress.advance()
                self._after(step)

            for stage in self._stages:
                if compiler and self._seconds_left() > 0:
                    progress.detail(f"compiling: {stage.title}")
                    self._compile(compiler, [step for step in stage.steps if self._search.is_due(step)])
                self._search.run(stage.steps, compare, after_each)
        self.save()

    def _compile(self, compiler: ahead.Compiler, steps: Sequence[Step]) -> None:
        """Every table that the steps will measure, each once."""
        work = {
            repr((step.cases, table)): (step.cases, table)
            for step in steps
            for table in step.variants(self._search.table).values()
        }
        # What is not ready by then is compiled where it is measured.
        if failures := compiler.compile(list(work.values()), self._seconds_left() / 2):
            self._console.print(f"{len(failures)} tasks could not be compiled ahead: {failures[0]}", highlight=False)

    def _compare(self, step: Step, variants: dict[str, Any]) -> Comparison:
        def measured(case: Case, tables: dict[str, Any]) -> Any:
            return measure(case, tables, self._args.repetitions, self._device)

        weights = [case.node.count for case in step.cases]
        return compare_cases(step.cases, weights, variants, measured, self._seconds_left)

    def _after(self, step: Step) -> None:
        taken = self._search.taken[-1] if self._search.taken else None
        if taken is None or taken.step is not step:
            return
        for name, reason in taken.comparison.dropped.items():
            self._console.print(f"{step.name} {name} is dropped: {reason}", highlight=False)
        if change := taken.change:
            self._console.print(
                f"{change.place}: {change.before} -> {change.after}, {change.gain:+.1%} (noise {change.noise:.1%})"
            )
        self.save()

    def save(self) -> None:
        """The record and, unless it is a dry run or nothing was measured, the table."""
        write_json(self._args.record, self._record())
        if self._search.taken and not self._args.dry_run:
            tuned_on = [*self._earlier, self._summary()]
            launch_file.write(self._search.table._replace(tuned_on=tuned_on), self._target)

    def _summary(self) -> dict[str, Any]:
        """What the table says of this search."""
        note = {} if self._device.type == "cuda" else {"note": MEANINGLESS}
        return {
            **note,
            **self._environment,
            "settings": self._settings(),
            "changes": [asdict(change) for change in self._search.changes],
            "not_searched": self._search.not_searched,
        }

    def _settings(self) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, Path) else v for name, v in vars(self._args).items()}

    def _record(self) -> dict[str, Any]:
        return {
            "summary": self._summary(),
            "steps": [_recorded(taken) for taken in self._search.taken],
        }

    def show(self) -> None:
        """Tables of the accepted changes and of the switches, what was not searched, what was written."""
        self._console.print(_changes_table(self._search))
        for kind, table in ((OneLaunchLimit, _one_launch_table), (Switch, _switches_table)):
            if any(isinstance(taken.step, kind) for taken in self._search.taken):
                self._console.print(table(self._search.taken))
        if left := self._search.not_searched:
            self._console.print(f"Time was up: {len(left)} places were not searched: {', '.join(left)}")
        if self._device.type == "cpu":
            self._console.print(f"[yellow]These are {MEANINGLESS}.")
        self._console.print(f"every measurement: {self._args.record}")
        if self._search.taken and not self._args.dry_run:
            self._console.print(f"the table: {self._target}")


def _recorded(taken: Taken) -> dict[str, Any]:
    comparison = taken.comparison
    return {
        "place": taken.step.name,
        "cases": [asdict(case) for case in taken.step.cases],
        "medians_ms": comparison.medians,
        "gains": {name: comparison.gain(name) for name in comparison.candidates},
        "noise": comparison.noise,
        "dropped": comparison.dropped,
        "change": asdict(taken.change) if taken.change else None,
    }


def _changes_table(search: Search) -> Rows:
    title = f"Launch table: {len(search.changes)} changes in {len(search.taken)} comparisons"
    table = Rows(title, keys=("place",), values=("before", "after", "gain", "noise"))
    for change in search.changes:
        table.add(change.place, change.before, change.after, f"{change.gain:+.1%}", f"{change.noise:.1%}")
    return table


def _one_launch_table(taken: Sequence[Taken]) -> Rows:
    """What one launch gains over two, by the size of the node."""
    table = Rows(
        "One launch a direction: what it gains over two",
        keys=("direction", "layout"),
        values=("elements", "gain", "noise"),
    )
    for step, comparison in ((t.step, t.comparison) for t in taken if isinstance(t.step, OneLaunchLimit)):
        sizes = [case.geometry.numel for case in step.cases]
        for size in sorted(set(sizes)) if comparison.candidates else ():
            gain = comparison.gain(ONE_LAUNCH, [i for i, other in enumerate(sizes) if other == size])
            table.add(step.direction, step.layout, str(size), f"{gain:+.1%}", f"{comparison.noise:.1%}")
    return table


def _switches_table(taken: Sequence[Taken]) -> Rows:
    """What turning each switch over gains, by direction."""
    table = Rows(
        "Order and cache hints: what the other setting gains",
        keys=("switch", "compared"),
        values=(*DIRECTIONS, "both", "noise", "kept"),
    )
    for step, comparison, change in ((t.step, t.comparison, t.change) for t in taken if isinstance(t.step, Switch)):
        for other in comparison.candidates:
            of_each = [[i for i, case in enumerate(step.cases) if case.direction == d] for d in DIRECTIONS]
            gains = [f"{comparison.gain(other, cases):+.1%}" for cases in (*of_each, None)]
            before = "off" if other == "on" else "on"
            table.add(step.name, f"{before} -> {other}", *gains, f"{comparison.noise:.1%}", other if change else before)
    return table
