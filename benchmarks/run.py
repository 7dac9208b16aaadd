"""The one entry point of the benchmarks: ``python benchmarks/run.py [COMMAND]``; ``--help`` lists the commands.

Without a command: the correctness gate, then on a CUDA GPU the times of ResNet-50's nodes; on a machine without one the
gate through Triton's interpreter, and what can be counted there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

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
import node_timing
import science
import timing
import traffic
from gate import run_gate
from nodes import NETWORKS
from problems import DTYPES, LAYOUTS
from results import write
from rich.console import Console

COMMANDS = {"traffic": traffic, "audit": audit, "host": host, "coverage": fused_networks, "science": science}


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return COMMANDS[args.command].run(args) if args.command else _standard(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="repeatable; default 256 and 32")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--network", choices=NETWORKS, default="resnet50", help="whose nodes are timed")
    parser.add_argument("--form", help="only nodes whose form is this")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the JSON and CSV files")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0]))
    return parser


def _standard(args: argparse.Namespace) -> int:
    console = Console()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        console.print(f"[bold]{torch.cuda.get_device_name()}[/], torch {torch.__version__}")
    else:
        console.print(
            f"No CUDA GPU (torch {torch.__version__}): the kernels run in Triton's interpreter, which shows that they "
            "are right and what they move, not how fast they are."
        )
    dtypes = [DTYPES[args.dtype], torch.float32] if on_gpu else [DTYPES[args.dtype], torch.float64]
    verdicts = run_gate(device, list(dict.fromkeys(dtypes)), console)
    if not all(v.passed for v in verdicts):
        console.print("[red]The kernels are wrong on this machine: nothing was timed.")
        return 1
    if not on_gpu:
        short = [COMMANDS[name].run(_parser().parse_args([name, "--short"])) for name in ("traffic", "audit")]
        return max(short)
    nodes = [n for n in NETWORKS[args.network]().nodes if args.form in (None, n.form)]
    copy = timing.copy_bandwidth(device)
    timings = node_timing.time_nodes(
        nodes, args.batch or [256, 32], DTYPES[args.dtype], args.layout, device,
        node_timing.libraries(args.compile), args.repetitions, console,
    )  # fmt: skip
    console.print(node_timing.table(timings, copy))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    for path in write(args.output, settings, verdicts, timings, copy):
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
