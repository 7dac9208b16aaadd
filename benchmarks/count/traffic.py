"""Memory traffic of every kernel launch, counted on the CPU in Triton's interpreter; no GPU is needed.

``node_passes`` says what is counted; here it is put together for whole networks and shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from console.arguments import write_json
from console.progress import track
from console.rows import Rows
from resfused.kernels.activation import ACTIVATIONS, activation_of
from rich.console import Console
from workloads.nodes import FORMS, NETWORKS, Node
from workloads.problems import DTYPES, LAYOUTS

from count.node_passes import (
    BACKWARD,
    EVAL,
    FORK_PASSES,
    FORKED,
    FORWARD,
    PHASES,
    SEPARATE,
    WAYS,
    LaunchTraffic,
    Shape,
    count_node,
    eager_passes,
    kept,
)
from count.recorder import require_interpreter
from resfused import functional, reference

BATCH = 256
# A wide layer of MobileNetV2.
ACTIVATED: Shape = (BATCH, 96, 56, 56)
TRAINING, INFERENCE = MODES = ("training step", "inference")


@dataclass(frozen=True)
class NodeTraffic:
    """One node in one layout, launched in one way: our launches and eager's passes, by phase."""

    form: str
    way: str
    layout: str
    shape: Shape
    launches: dict[str, list[LaunchTraffic]]
    eager: dict[str, float]

    def activation(self, phase: str) -> float:
        return sum(launch.activation for launch in self.launches[phase])

    def channel(self, phase: str) -> float:
        return sum(launch.channel for launch in self.launches[phase])


@cache
def node_traffic(form: str, way: str, layout: str, dtype: torch.dtype, shape: Shape) -> NodeTraffic:
    launches = {phase: count_node(form, phase, way, layout, dtype, shape) for phase in PHASES}
    return NodeTraffic(form, way, layout, shape, launches, {phase: eager_passes(form, phase) for phase in PHASES})


def at_batch(node: Node) -> Shape:
    return BATCH, node.channels, node.height, node.width


def phases_of(node: Node, mode: str) -> tuple[str, ...]:
    """Which phases a node goes through in a training step or an inference."""
    return (FORWARD, FORKED if node.forked else BACKWARD) if mode == TRAINING else (EVAL,)


@dataclass(frozen=True)
class Total:
    """Passes of a whole network's nodes, per normalised element: an element of the input of one of its norms.

    ``elements`` is their number, at batch ``BATCH``.
    """

    network: str
    way: str
    layout: str
    mode: str
    activation: float
    channel: float
    eager: float
    elements: int

    @property
    def ours(self) -> float:
        return self.activation + self.channel

    @property
    def ratio(self) -> float:
        return self.eager / self.ours


def network_total(name: str, way: str, layout: str, dtype: torch.dtype, mode: str) -> Total:
    """A training step (forward, backward and the addition of gradients at forks) or an inference.

    The blocks stand in a ``resfused.Sequential`` each stage after the other; the fork behind the stem's max-pool is
    autograd's. Convolutions, pooling and the optimiser are not counted; of eager, nothing per channel.
    """
    network = NETWORKS[name]()
    elements = sum(node.count * node.norms * node.elements for node in network.nodes)
    pooled = FORK_PASSES * network.pooled_elements / elements if mode == TRAINING else 0.0

    def per_element(passes: Callable[[Node, str], float]) -> float:
        weighted = (
            node.count * node.elements * passes(node, phase)
            for node in network.nodes
            for phase in phases_of(node, mode)
        )
        return sum(weighted) / elements

    def launches(node: Node, phase: str) -> list[LaunchTraffic]:
        return count_node(node.form, phase, way, layout, dtype, at_batch(node))

    return Total(
        name,
        way,
        layout,
        mode,
        activation=per_element(lambda node, phase: sum(t.activation for t in launches(node, phase))) + pooled,
        channel=per_element(lambda node, phase: sum(t.channel for t in launches(node, phase))),
        eager=per_element(lambda node, phase: eager_passes(node.form, phase)) + pooled,
        elements=BATCH * elements,
    )


def _node_table(traffic: list[NodeTraffic], dtype: str) -> Rows:
    title = f"Passes over memory of one node, {dtype}, batch {BATCH}: ours + per-channel part (eager)"
    table = Rows(title, keys=("way", "layout", "form", "C", "HxW"), values=PHASES)
    for t in traffic:
        phases = [f"{t.activation(p):.4f} + {t.channel(p):.4f} ({t.eager[p]:.0f})" for p in PHASES]
        _, channels, height, width = t.shape
        table.add(t.way, t.layout, t.form, str(channels), f"{height}x{width}", *phases)
    return table


def _launch_table(traffic: list[NodeTraffic]) -> Rows:
    """The launches of the first node of each form, way and layout."""
    table = Rows(
        "Passes of each launch, the first node of each form above",
        keys=("way", "layout", "form", "phase", "kernel"),
        values=("read", "written", "per-channel read", "per-channel written"),
    )
    first: dict[tuple[str, str, str], NodeTraffic] = {}
    for t in traffic:
        first.setdefault((t.way, t.layout, t.form), t)
    for t in first.values():
        for phase in PHASES:
            for launch in t.launches[phase]:
                numbers = (
                    launch.activation_read, launch.activation_written, launch.channel_read, launch.channel_written
                )  # fmt: skip
                table.add(t.way, t.layout, t.form, phase, launch.kernel, *(f"{n:.4f}" for n in numbers))
    return table


def _activation_table(dtype: str) -> Rows:
    """Every activation in every form, with all gradients, in separate launches over channels_last."""
    table = Rows(
        f"Any activation: passes of one node, {dtype}, batch {BATCH}, and what it keeps for its backward: ours (eager)",
        keys=("activation", "form"),
        values=("forward", "backward", "kept"),
        caption="Kept beside the output, in activations of float32.",
    )
    for activation, form in product(map(activation_of, ACTIVATIONS), FORMS):
        named = form.replace("relu", activation.name)
        passes = []
        for phase in (FORWARD, BACKWARD):
            launches = count_node(form, phase, SEPARATE, "channels_last", DTYPES[dtype], ACTIVATED, activation)
            passes.append(f"{sum(t.activation for t in launches):.4f} ({eager_passes(form, phase, activation):.0f})")
        both = (kept(library, form, activation) for library in (functional, reference))
        table.add(activation.name, named, *passes, "{:.4f} ({:.0f})".format(*both))
    return table


def _gigabytes(total: Total, itemsize: int) -> tuple[float, float]:
    """(ours, eager)"""
    return total.ours * total.elements * itemsize / 1e9, total.eager * total.elements * itemsize / 1e9


def _total_table(totals: list[Total], dtype: str, bandwidth: float) -> Rows:
    table = Rows(
        f"Whole networks, {dtype}, batch {BATCH}: passes per normalised element, convolutions excluded",
        keys=("network", "way", "layout", "mode"),
        values=("ours", "+ per-channel", "eager", "eager / ours", "ours GB", "eager GB", "ours ms", "eager ms"),
        caption=f"Times are computed, not measured: bytes / {bandwidth:g} TB/s.",
    )
    for total in totals:
        ours, eager = _gigabytes(total, DTYPES[dtype].itemsize)
        passes = (total.activation, total.channel, total.eager, total.ratio)
        table.add(
            total.network, total.way, total.layout, total.mode, *(f"{p:.3f}" for p in passes),
            f"{ours:.1f}", f"{eager:.1f}", f"{ours / bandwidth:.2f}", f"{eager / bandwidth:.2f}",
        )  # fmt: skip
    return table


def run(args: argparse.Namespace) -> int:
    """Counts, prints the tables, writes the JSON file; 0."""
    require_interpreter()
    dtype = DTYPES[args.dtype]
    networks = list(NETWORKS) if args.network == "both" else [args.network]
    layouts = list(LAYOUTS) if args.layout == "both" else [args.layout]
    nodes = [node for name in networks for node in NETWORKS[name]().nodes]
    if args.short:
        nodes = [next(node for node in nodes if node.form == form) for form in FORMS]
    console = Console()
    wanted = list(product(WAYS, layouts, nodes))
    counted = [
        node_traffic(node.form, way, layout, dtype, at_batch(node))
        for way, layout, node in track(wanted, "Counting", console=console)
    ]
    # Both networks have some nodes in common.
    traffic = list({(t.way, t.layout, t.form, t.shape): t for t in counted}.values())
    totals = []
    if not args.short:
        cases = product(networks, WAYS, layouts)
        totals = [network_total(*case, dtype, mode) for case in cases for mode in MODES]
    console.print(_node_table(traffic, args.dtype))
    if totals:
        console.print(_activation_table(args.dtype))
        console.print(_launch_table(traffic))
        console.print(_total_table(totals, args.dtype, args.bandwidth))
    if args.json:
        write_json(args.json, _as_json(traffic, totals, args))
    return 0


def _as_json(traffic: list[NodeTraffic], totals: list[Total], args: argparse.Namespace) -> dict[str, Any]:
    def with_sums(total: Total) -> dict[str, Any]:
        ours, eager = _gigabytes(total, DTYPES[args.dtype].itemsize)
        computed = {"ours_ms": ours / args.bandwidth, "eager_ms": eager / args.bandwidth}
        return {**asdict(total), "ratio": total.ratio, "ours_gb": ours, "eager_gb": eager, "computed": computed}

    return {
        "dtype": args.dtype,
        "batch": BATCH,
        "bandwidth_tb_s": args.bandwidth,
        "nodes": [asdict(t) for t in traffic],
        "totals": [with_sums(total) for total in totals],
    }
