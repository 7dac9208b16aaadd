"""What every measuring command begins with: a result file, a deadline, a copy to compare with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from console.arguments import UsageError
from console.rows import Rows
from record.results import Run, default_path, machine
from rich.console import Console
from rich.markup import escape

from measure.timing import Deadline, copy_bandwidth, first_line
from resfused.backend import Backend

# What ours runs on: forced, so that nothing else is timed in its name.
BACKENDS: dict[str, Backend] = {"cuda": "triton", "cpu": "native"}
# Of the run without a command, and of one. What begins last on a GPU, torch.compile of a network, takes up to a minute.
MINUTES = {"cuda": (4.5, 7.0), "cpu": (2.3, 60.0)}
MANY = 3


@dataclass(frozen=True)
class Measuring:
    """``small``: whether shapes are to be so small that they only show that it works."""

    run: Run
    copy: float
    deadline: Deadline
    device: torch.device
    small: bool
    console: Console
    lost: list[str] = field(default_factory=list)
    """What ``survives`` has met."""

    @contextmanager
    def survives(self, what: str) -> Iterator[None]:
        """An error within it costs only ``what``; one about how the command was called is its caller's."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            self.lost.append(what)
            self.run.leave_out(what, f"{type(error).__name__}: {first_line(error)}")

    @property
    def failed(self) -> bool:
        """Whether ours was wrong or could not run anywhere, or anything was lost; what time did not allow was not."""
        over = self.deadline.over
        return bool(self.lost) or any(
            what.startswith("resfused") and reason != over for what, reason in self.run.left_out
        )


def begin(args: argparse.Namespace) -> Measuring:
    """Raises: UsageError, before anything is changed, where the device is not there or the result file cannot be added
    to."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a CUDA GPU, and torch sees none")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(name)
    console = Console()
    deadline = Deadline(args.minutes or MINUTES[name][args.command is not None])
    run = Run(args.results or default_path(name), vars(args), name)
    copy = copy_bandwidth(device)
    run.note("copy_gb_s", copy)
    console.print(f"[bold]{machine(run.environment)}[/], torch {torch.__version__}; a copy moves {copy:.0f} GB/s")
    return Measuring(run, copy, deadline, device, args.small, console)


def left_out(run: Run) -> Rows:
    """By reason; of many with one reason the first."""
    table = Rows("Left out", keys=("what", "because"))
    by_reason: dict[str, list[str]] = {}
    for what, reason in run.left_out:
        by_reason.setdefault(reason, []).append(what)
    for reason, of_it in by_reason.items():
        shown = of_it if len(of_it) <= MANY else [f"{of_it[0]}, and {len(of_it) - 1} more"]
        for what in shown:
            table.add(escape(what), escape(reason))
    return table
