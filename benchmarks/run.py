"""The one entry point of the benchmarks: ``python benchmarks/run.py [COMMAND]``; ``--help`` lists the commands.

Without a command: the correctness gate, then the nodes of ResNet-50 and training steps against what one would otherwise
use, tables and plots, on a CUDA GPU within six minutes and on a CPU in three. Commands that measure add to one
result file.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from types import ModuleType

import commands
from console.arguments import UsageError


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Torch and what imports it wait until the command and its arguments are known to be right."""
    parser = commands.parser((__doc__ or "").partition("\n\n")[2])
    args = parser.parse_args(arguments)
    _prepare(interpreted=args.command is not None and not commands.COMMANDS[args.command].measures)
    try:
        return _run(args)
    except UsageError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"needs the package {error.name}, which is not installed")


def _prepare(interpreted: bool) -> None:
    """``interpreted``: whether the command runs Triton's kernels, without a GPU in the interpreter."""
    import torch
    from workloads.interpreter import speed_up

    if not sys.stdout.isatty():
        # A log file has more room than a terminal.
        os.environ.setdefault("COLUMNS", "170")
    if interpreted and not torch.cuda.is_available():
        # Read when the kernels are defined, so before the first import of resfused. Processes that compile drop it.
        os.environ["TRITON_INTERPRET"] = "1"
        speed_up()


def _run(args: argparse.Namespace) -> int:
    command = commands.COMMANDS.get(args.command, commands.STANDARD)
    module = import_module(command.module)
    return _measure(module, args) if command.measures else module.run(args)


def _measure(module: ModuleType, args: argparse.Namespace) -> int:
    """Measures, and shows the whole result file; 0, or 1 where ours was wrong or could not run."""
    from measure import measuring
    from record.results import load
    from report import command as report

    import resfused

    m = measuring.begin(args)
    with resfused.use_backend(measuring.BACKENDS[m.device.type]), m.survives("the rest of the run"):
        module.measure(args, m)
    for results in load([m.run.path]).values():
        with m.survives("the tables"):
            report.show(results, m.console)
        m.console.print(f"wrote {m.run.path}", soft_wrap=True)
        if not args.no_plots:
            with m.survives("CSV files and plots"):
                for path in report.write(results):
                    m.console.print(f"wrote {path}", soft_wrap=True)
    if m.run.left_out:
        m.console.print(measuring.left_out(m.run))
    return 1 if m.failed else 0


if __name__ == "__main__":
    sys.exit(main())
