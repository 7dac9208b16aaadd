"""What residual blocks are for: four experiments on real images, with fused blocks and with reference blocks.

Degradation of deep plain networks, the gradient's direct path, identity initialisation, and forms of shortcuts. Each
writes its numbers as JSON and a figure; a last figure shows that fused and reference blocks train the same way. On a
CPU the long trainings run on plain PyTorch operators, and the kernels, in Triton's interpreter, are compared with the
reference over shorter whole trainings; on a GPU everything runs on the kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from images import DIGITS, DataError
from rich.console import Console
from rich.table import Table

from science import agreement, degradation, gradient_highway, identity_initialisation, page, records, shortcut_forms
from science.session import DEFAULT, FULL, SHORT, Session, Source, default_processes, one_thread

EXPERIMENTS = {each.NAME: each for each in (degradation, gradient_highway, identity_initialisation, shortcut_forms)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; default all")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="default: each experiment's own number")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the full size, for a GPU")
    size.add_argument("--short", action="store_true", help="a few steps of tiny networks")
    parser.add_argument("--data", default=DIGITS, help=f"{DIGITS} (default), or a folder with train/ and val/ in it")
    parser.add_argument("--image-size", type=_positive, default=32, metavar="N", help="of a folder's images")
    parser.add_argument("--processes", type=_positive, default=default_processes(), metavar="N",
                        help="trainings at a time on a CPU; default %(default)s")  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("results/science"), metavar="FOLDER", help="default %(default)s"
    )
    parser.add_argument(
        "--write-page", action="store_true", help="the tables of benchmarks/science/README.md, from the results"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the experiments, prints their tables, writes their files; 1 where a fused training went its own way."""
    unknown = [name for name in args.experiment if name not in EXPERIMENTS]
    if unknown:
        raise SystemExit(f"run.py science: error: EXPERIMENT must be of {', '.join(EXPERIMENTS)}, but got {unknown[0]}")
    if args.output.exists() and not args.output.is_dir():
        raise SystemExit(f"run.py science: error: --output must be a folder, or nothing yet, but got {args.output}")
    args.output.mkdir(parents=True, exist_ok=True)
    size = FULL if args.full else SHORT if args.short else DEFAULT
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(Source(args.data, args.image_size), size, args.seeds, args.processes, device, Console())
    try:
        with one_thread():
            within = [run_one(name, session, args.output) for name in args.experiment or EXPERIMENTS]
    except DataError as error:
        raise SystemExit(f"run.py science: error: {error}") from error
    figure = agreement.draw(records.read_all(args.output, EXPERIMENTS), args.output)
    session.console.print(f"wrote {figure}", soft_wrap=True)
    if args.write_page:
        session.console.print(f"wrote {page.write(EXPERIMENTS, args.output)}")
    return 0 if all(within) else 1


def run_one(name: str, session: Session, folder: Path) -> bool:
    """One experiment; whether its fused trainings went the reference's way."""
    experiment = EXPERIMENTS[name]
    start = perf_counter()
    content = experiment.measure(session)
    content = {"size": session.size, "device": session.device.type, "processes": session.processes,
               "wall_seconds": round(perf_counter() - start, 1), **content}  # fmt: skip
    _print_table(session.console, experiment.title(content), experiment.HEADINGS, experiment.summary(content))
    for finding in experiment.findings(content):
        session.console.print(finding)
    found = content["agreements"]
    _print_table(session.console, agreement.title(found), agreement.HEADINGS, agreement.summary(found))
    paths = records.write(folder, name, content), experiment.draw(content, folder)
    session.console.print(f"{name}: {content['wall_seconds']} s, wrote {' and '.join(map(str, paths))}", soft_wrap=True)
    return all(a["within"] for a in found)


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but got {text!r}")
    return int(text)
