"""The one entry point of the benchmarks: ``python benchmarks/run.py [COMMAND]``; ``--help`` lists the commands.

Without a command: the correctness gate, then our kernels, the nodes of ResNet-50 and its training step against what one
would otherwise use, tables and plots; on a machine without a CUDA GPU a shorter gate, and passes over memory as a table
and a picture. Commands that measure add to one result file.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Read when the kernels are defined, so before the first import of resfused; not in processes that compile.
    os.environ["TRITON_INTERPRET"] = "1"

if not sys.stdout.isatty():
    # Tables in a log file are not cut to a terminal's width.
    os.environ["COLUMNS"] = "170"

import audit
import fused_networks
import host
import kernel_profile
import measuring
import network_timing
import node_timing
import report
import science
import standard
import traffic
import tuning
import without_gpu
from interpreter import keep_patches
from results import ResultError, load
from rich.console import Console

COMMANDS = {
    "tune": tuning, "report": report, "science": science,
    "traffic": traffic, "audit": audit, "host": host, "coverage": fused_networks,
}  # fmt: skip
# Those that time something, and add to a result file.
MEASURING = {"nodes": node_timing, "networks": network_timing, "profile": kernel_profile}


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.command in COMMANDS:
        return COMMANDS[args.command].run(args)
    if args.command is None and not torch.cuda.is_available():
        return without_gpu.run(args)
    return _measure(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    measuring.add_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in (MEASURING | COMMANDS).items():
        command = commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0])
        if name in MEASURING:
            measuring.add_arguments(command)
        module.add_arguments(command)
    return parser


def _measure(args: argparse.Namespace) -> int:
    """Measures, and shows the whole result file; 0, or 1 where ours was wrong or nothing could be measured."""
    try:
        m = measuring.begin(args)
        (MEASURING[args.command] if args.command else standard).measure(args, m)
    except (ResultError, ValueError) as error:
        Console(stderr=True).print(f"[red]run.py: error: {error}", soft_wrap=True)
        return 1
    if m.run.left_out:
        m.console.print(measuring.left_out(m.run))
    for results in load([m.run.path]).values():
        report.show(results, m.console)
        for path in (m.run.path, *report.write(results, m.run.path.parent)):
            m.console.print(f"wrote {path}", soft_wrap=True)
    return 1 if m.failed else 0


if __name__ == "__main__":
    keep_patches()
    sys.exit(main())
