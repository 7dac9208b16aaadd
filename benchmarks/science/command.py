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
from console.arguments import output_file
from console.rows import Rows
from rich.console import Console

from science import agreement, page, records
from science.experiments import degradation, gradient_highway, identity_initialisation, shortcut_forms
from science.session import DEFAULT, FULL, SHORT, Session, Source, one_thread

EXPERIMENTS = {each.NAME: each for each in (degradation, gradient_highway, identity_initialisation, shortcut_forms)}


def run(args: argparse.Namespace) -> int:
    """Runs the experiments, prints their tables, writes their files; 1 where a fused training went its own way.

    Raises: UsageError, with nothing run, where a file could not be written or the images cannot be had.
    """
    names = args.experiment or list(EXPERIMENTS)
    files = [f"{name}.{kind}" for name in names for kind in ("json", "png")]
    for file in (*files, f"{agreement.SAME_TRAINING}.png"):
        output_file(args.output / file)
    if args.write_page:
        output_file(page.PAGE)
    args.output.mkdir(parents=True, exist_ok=True)
    size = FULL if args.full else SHORT if args.short else DEFAULT
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(Source(args.data, args.image_size), size, args.seeds, args.processes, device, Console())
    with one_thread():
        within = [run_one(name, session, args.output) for name in names]
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
    table = Rows(title, headings[:1], headings[1:])
    for row in rows:
        table.add(*row)
    console.print(table)
