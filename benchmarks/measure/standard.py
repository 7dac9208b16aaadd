"""The run without a command on a GPU: the gate, our kernels, ResNet-50's nodes and training step against the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from workloads.gate import every_case, run_gate
from workloads.nodes import NETWORKS

from measure import network_timing, node_timing
from measure.kernel_profile import profile_nodes
from measure.measuring import Measuring
from measure.network_timing import standard_workload
from measure.node_timing import BATCHES, SMALL, SMALL_BATCHES, Comparison


def measure(args: argparse.Namespace, m: Measuring) -> None:
    """What decides most comes first: a short lease may end before the rest. Nothing is timed with wrong kernels."""
    verdicts = run_gate(m.device, every_case([torch.bfloat16, torch.float32]), m.console)
    m.run.note("gate", [{**asdict(v), "passed": v.passed} for v in verdicts])
    if not all(v.passed for v in verdicts):
        m.console.print("[red]The kernels are wrong on this machine: nothing was timed.")
        m.run.leave_out("resfused", "WRONG: see the gate")
        return
    nodes = SMALL if m.small else node_timing.unique(NETWORKS["resnet50"]().nodes)
    for batch in SMALL_BATCHES if m.small else BATCHES:
        times = node_timing.repetitions(m.small)
        c = Comparison(nodes, [batch], torch.bfloat16, "channels_last", times)
        profile_nodes(c, m, counters=False)
        node_timing.time_nodes(c, m)
        if batch in (BATCHES[0], *SMALL_BATCHES):
            times = network_timing.repetitions(m.small)
            network_timing.time_networks([standard_workload(m.small)], network_timing.STANDARD, times, m)
