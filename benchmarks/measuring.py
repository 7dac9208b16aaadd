"""What every measuring command begins with: a result file, a deadline, a copy to compare with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import CPU_LABEL, Run, default_path
from rich.console import Console
from rich.table import Table
from timing import Deadline, copy_bandwidth

DEFAULTS: dict[str, Any] = {"results": None, "minutes": 7, "small": False}


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command and of its sub-commands: what stands before one holds in it, too."""
    nested = " " in parser.prog
    defaults = dict.fromkeys(DEFAULTS, argparse.SUPPRESS) if nested else DEFAULTS
    parser.add_argument(
        "--results", type=Path, metavar="PATH", default=defaults["results"],
        help="result file to add to; default results/<the GPU's name>.json",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=defaults["minutes"],
        help=f"nothing new begins after them; default {DEFAULTS['minutes']}",
    )  # fmt: skip
    parser.add_argument(
        "--small", action="store_true", default=defaults["small"],
        help="small shapes; always so without a CUDA GPU",
    )  # fmt: skip


def begin(args: argparse.Namespace) -> Measuring:
    """Raises: ResultError, before anything is changed, where ``--results`` cannot be added to."""
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


def left_out(run: Run) -> Table:
    table = Table(title="Left out")
    table.add_column("what")
    table.add_column("because", overflow="fold")
    for what, reason in run.left_out:
        table.add_row(what, reason)
    return table
