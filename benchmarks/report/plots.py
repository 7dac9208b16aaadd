"""Plots of a result file, one PNG each: what was timed of nodes, kernels and networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from measure import network_timing as networks
from measure import variants as nodes
from record.results import KernelTime, NetworkTime, NodeTime, OfANode, Results, StepMemory
from workloads.passes import BOTH, PHASES

from report import gains
from report import pyplot as plt
from report.goals import ratios

# Of Okabe and Ito, which colour-blind readers tell apart.
T = TypeVar("T", bound=OfANode)
OF_COPY = "fraction of the bandwidth of a device-to-device copy"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def write_plots(results: Results, stem: Path) -> list[Path]:
    """``<stem>-speedup-batch-256.png`` and so on, of what was measured; on a CPU ``<stem>-gains.png`` first."""
    drawn = [*(_plots(results) if results.on_gpu else _plots_of_a_cpu(results)), *_plots_of_memory(results)]
    return [_save(draw(), results.environments[-1], results.machine, stem, name) for name, draw in drawn]


def _save(figure: Any, versions: dict[str, Any], label: str, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    made = f"{label}; torch {versions['torch']}, triton {versions['triton']}, {versions['commit']}"
    figure.supxlabel(made, x=0.995, ha="right", fontsize=7, color="0.4")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _plots(results: Results) -> Iterator[tuple[str, Callable[[], Any]]]:
    for setting, times in _by_setting(results.of(NodeTime)).items():
        yield f"speedup-{_slug(setting)}", partial(_speedup, times, setting)
        yield f"bandwidth-{_slug(setting)}", partial(_bandwidth, times, setting)
    for setting, kernels in _by_setting(results.of(KernelTime)).items():
        yield f"kernels-{_slug(setting)}", partial(_kernels, kernels, setting)
    if steps := results.of(NetworkTime):
        yield "images", lambda: _networks(steps, "images per second", lambda t: t.images_s)
    if with_memory := [t for t in steps if t.peak_bytes]:
        yield "memory", lambda: _networks(with_memory, "peak memory of a step, GB", lambda t: (t.peak_bytes or 0) / 1e9)


def _plots_of_a_cpu(results: Results) -> Iterator[tuple[str, Callable[[], Any]]]:
    if gains.of_nodes(results):
        yield "gains", partial(gains.draw, results)
    for setting, times in _by_setting(results.of(NodeTime)).items():
        yield f"speedup-{_slug(setting)}", partial(_speedup, times, setting)


def _plots_of_memory(results: Results) -> Iterator[tuple[str, Callable[[], Any]]]:
    if found := results.of(StepMemory):
        yield "memory-against-time", partial(_memory_against_time, found)


def _memory_against_time(found: list[StepMemory]) -> Any:
    """A panel for each workload, a dot for each way: what is alive at the end of the forward, and the step's time."""
    workloads = list(dict.fromkeys(each.workload for each in found))
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(3.6 * len(workloads) + 1, 3.6), squeeze=False, layout="constrained"
    )
    variants = list(dict.fromkeys(each.variant for each in found))
    for workload, axes in zip(workloads, panels[0], strict=True):
        network, batch, pixels, dtype = workload
        for variant, colour in zip(variants, COLOURS, strict=False):
            of_it = [each for each in found if (each.workload, each.variant) == (workload, variant)]
            times, megabytes = [e.milliseconds for e in of_it], [e.live_bytes / 2**20 for e in of_it]
            axes.scatter(times, megabytes, s=40, color=colour, label=variant)
        axes.set_title(f"{network}\nbatch {batch}, {pixels} x {pixels}, {dtype}", loc="left", fontsize=9)
        axes.set_xlabel("a training step, ms", fontsize=8)
        axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("MB alive at the end of the forward", fontsize=8)
    panels[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _by_setting(times: list[T]) -> dict[str, list[T]]:
    """By dtype, layout, batch, CUDA graphs and memory, in words."""
    found: dict[str, list[T]] = {}
    for t in times:
        graphs = ", CUDA graphs" if isinstance(t, NodeTime) and t.cuda_graph else ""
        kept = ", memory kept mapped" if isinstance(t, NodeTime) and t.kept_mapped else ""
        found.setdefault(f"{t.dtype} {t.layout}, batch {t.batch}{graphs}{kept}", []).append(t)
    return found


def _slug(setting: str) -> str:
    return setting.lower().replace(",", "").replace(" ", "-")


def _speedup(times: list[NodeTime], setting: str) -> Any:
    """Each variant's time over ours on each node, forward and backward together."""
    both = [t for t in times if t.phase == BOTH]
    others = [v for v in dict.fromkeys(t.variant for t in both) if v != nodes.OURS]
    points = [
        (_label(form, shape), other, ratio)
        for other in others
        for (form, shape, *_), ratio in ratios(both, other).items()
    ]
    return _dots(
        points, others, f"Nodes, forward + backward: {setting}", "time / resfused's (right of 1: resfused is faster)"
    )


def _bandwidth(times: list[NodeTime], setting: str) -> Any:
    """Our fraction of the copy's bandwidth, of the least bytes, by phase."""
    points = [(_label(t.form, t.shape), t.phase, t.of_copy) for t in times if t.variant == nodes.OURS]
    return _dots(points, PHASES, f"Nodes, least bytes of two phases over time: {setting}", OF_COPY)


def _kernels(times: list[KernelTime], setting: str) -> Any:
    """Every kernel's fraction of the copy's bandwidth."""
    points = [(_label(t.form, t.shape), t.kernel, t.of_copy) for t in times]
    kernels = list(dict.fromkeys(t.kernel for t in times))
    return _dots(points, kernels, f"Streaming kernels, least bytes over time: {setting}", OF_COPY)


def _dots(points: list[tuple[str, str, float]], series: Sequence[str], title: str, what: str) -> Any:
    """A row for each label, a dot for each of its (label, series, value); a line at 1."""
    labels = list(dict.fromkeys(label for label, *_ in points))
    figure, axes = plt.subplots(figsize=(9, 0.27 * len(labels) + 1.5), layout="constrained")
    for name, colour in zip(series, COLOURS, strict=False):
        rows = [(value, labels.index(label)) for label, of, value in points if of == name]
        fill = "none" if name == nodes.AGAIN else colour
        if rows:
            values, places = zip(*rows, strict=True)
            axes.scatter(values, places, s=36, label=name, edgecolors=colour, facecolors=fill)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.05)
    axes.set_xlabel(what)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _networks(times: list[NetworkTime], what: str, value: Callable[[NetworkTime], float]) -> Any:
    """A panel for each workload, a bar for each variant."""
    workloads = list(dict.fromkeys(t.workload for t in times))
    bars = max(sum(t.workload == w for t in times) for w in workloads)
    figure, panels = plt.subplots(
        len(workloads), figsize=(8, (0.28 * bars + 0.7) * len(workloads) + 0.3), squeeze=False, layout="constrained"
    )
    for workload, axes in zip(workloads, panels[:, 0], strict=True):
        network, mode, batch, dtype = workload
        of_it = [t for t in times if t.workload == workload]
        colours = [
            COLOURS[0] if t.variant in networks.WAYS and networks.WAYS[t.variant].fused else "0.7" for t in of_it
        ]
        drawn = axes.barh([t.variant for t in of_it], [value(t) for t in of_it], color=colours)
        axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{network} {mode}, batch {batch}, {dtype}: {what}", loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(form: str, shape: str) -> str:
    return f"{form}  {shape}"
