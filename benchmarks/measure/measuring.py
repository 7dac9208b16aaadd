"""What every measuring command begins with: a result file, a deadline, a copy to compare with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from console.rows import Rows
from record.results import CPU_LABEL, Run, default_path
from rich.console import Console
from rich.markup import escape

from measure.timing import Deadline, copy_bandwidth


@dataclass(frozen=True)
class Measuring:
    """``small``: whether shapes are to be small enough for Triton's interpreter."""

    run: Run
    copy: float
    deadline: Deadline
    device: torch.device
    small: bool
    console: Console

    @property
    def failed(self) -> bool:
        """Whether ours was wrong or could not run anywhere; for what time did not allow it cannot be blamed."""
        over = self.deadline.over
        return any(what.startswith("resfused") and reason != over for what, reason in self.run.left_out)


def begin(args: argparse.Namespace) -> Measuring:
    """Raises: UsageError, before anything is changed, where the result file cannot be added to."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    console = Console()
    if not on_gpu:
        torch.set_num_threads(1)
    run = Run(args.results or default_path(), vars(args))
    copy = copy_bandwidth(device)
    run.note("copy_gb_s", copy)
    where = torch.cuda.get_device_name() if on_gpu else CPU_LABEL
    console.print(f"[bold]{where}[/], torch {torch.__version__}; a copy moves {copy:.0f} GB/s")
    return Measuring(run, copy, Deadline(args.minutes), device, args.small or not on_gpu, console)


def left_out(run: Run) -> Rows:
    table = Rows("Left out", keys=("what", "because"))
    for what, reason in run.left_out:
        table.add(escape(what), escape(reason))
    return table
