"""The run without a command where there is no GPU: are the kernels right, and how much less memory do they move?

Both are as on a GPU: the kernels run in Triton's interpreter, where every load and store is seen. Its times say nothing
about the kernels' speed, and none are taken.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product

import torch
from console.progress import track
from console.rows import Rows
from count import traffic
from record.environment import environment
from record.results import PassCount, Run, default_path
from rich.console import Console
from workloads.gate import covering_cases, run_gate
from workloads.nodes import FORMS, NETWORKS, Node, resnet50
from workloads.passes import BACKWARD, BOTH, FORWARD, PHASES

from report import plots

# The last is off until a GPU has shown its worth.
VARIANTS = ("eager", "resfused", "resfused in one launch")
LAYOUT, DTYPE = "channels_last", torch.bfloat16
NAMES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}


def run(args: argparse.Namespace) -> int:
    """The gate, the counts as a table and a picture, a verdict; 1 where a kernel is wrong.

    Raises: ResultError, before anything is changed, where ``--results`` cannot be added to.
    """
    torch.set_num_threads(1)
    console = Console()
    made = Run(args.results or default_path(), vars(args))
    console.print(f"[bold]No CUDA GPU[/]: the kernels run in Triton's interpreter; torch {torch.__version__}")
    verdicts = run_gate(torch.device("cpu"), covering_cases(), console)
    made.note("gate", [{**asdict(v), "passed": v.passed} for v in verdicts])
    right = sum(v.passed for v in verdicts)
    correct = f"Correct: {right} of {len(verdicts)} cases, compared with PyTorch in float64."
    if right < len(verdicts):
        console.print(f"[red]{correct} The kernels are wrong on this machine: nothing was counted.")
        return 1
    counts = count(console)
    made.add(counts)
    console.print(table(counts))
    for path in (made.path, plots.write_passes(counts, environment(), made.path.with_suffix(""))):
        console.print(f"wrote {path}", soft_wrap=True)
    for line in (correct, *verdict(counts)):
        console.print(f"[bold]{line}", soft_wrap=True, highlight=False)
    return 0


def count(console: Console) -> list[PassCount]:
    """Of a node of each form by phase, and of a training step of each network; ours with what is per channel."""
    nodes = [node for make in NETWORKS.values() for node in make().nodes]
    for way, node in track(list(product(traffic.WAYS, nodes)), "Counting passes", console):
        for phase in traffic.phases_of(node, traffic.TRAINING):
            # What is counted once is remembered.
            _ours(node, phase, way)
    first = [next(node for node in resnet50().nodes if node.form == form) for form in FORMS]
    of_nodes = [c for node in first for phase in PHASES for c in _of_a_node(node, phase)]
    return of_nodes + [c for network in NETWORKS for c in _of_a_step(network)]


def _of_a_node(node: Node, phase: str) -> list[PassCount]:
    parts = (FORWARD, BACKWARD) if phase == BOTH else (phase,)
    eager = sum(traffic.eager_passes(node.form, part) for part in parts)
    ours = [sum(_ours(node, part, way) for part in parts) for way in traffic.WAYS]
    return [PassCount(node.form, phase, *of) for of in zip(VARIANTS, (eager, *ours), strict=True)]


def _of_a_step(network: str) -> list[PassCount]:
    totals = [traffic.network_total(network, way, LAYOUT, DTYPE, traffic.TRAINING) for way in traffic.WAYS]
    passes = (totals[0].eager, *(total.ours for total in totals))
    return [PassCount(NAMES[network], traffic.TRAINING, *of) for of in zip(VARIANTS, passes, strict=True)]


def _ours(node: Node, phase: str, way: str) -> float:
    launches = traffic.count_node(node.form, phase, way, LAYOUT, DTYPE, traffic.at_batch(node))
    return sum(launch.activation + launch.channel for launch in launches)


def table(counts: list[PassCount]) -> Rows:
    shown = Rows(
        f"Passes over memory, bfloat16, batch {traffic.BATCH}",
        keys=("of", "phase"),
        values=VARIANTS,
        caption="Of a training step: of norms, additions and ReLUs, per normalised element.",
    )
    rows: dict[tuple[str, str], list[str]] = {}
    for c in counts:
        rows.setdefault((c.what, c.phase), []).append(f"{c.passes:.2f}")
    for names, row in rows.items():
        shown.add(*names, *row)
    return shown


def verdict(counts: list[PassCount]) -> tuple[str, str]:
    """What was found of the traffic of the last network, and what would tell its speed."""
    eager, *ours = counts[-len(VARIANTS) :]
    times = [f"{eager.passes / c.passes:.1f}" for c in ours]
    return (
        f"Traffic: {times[0]} times less than eager around {eager.what}'s norms, {times[1]} in one launch.",
        "Speed: needs a CUDA GPU, where python benchmarks/run.py measures it.",
    )
