"""Plots of a result file, one PNG each: what was timed of nodes, kernels and networks, and passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from measure import network_timing as networks
from measure import variants as nodes
from record.results import CPU, CPU_LABEL, KernelTime, NetworkTime, NodeTime, OfANode, PassCount, Results
from workloads.passes import BOTH, PHASES

from report.goals import ratios

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Of Okabe and Ito, which colour-blind readers tell apart.
T = TypeVar("T", bound=OfANode)
OF_COPY = "fraction of the bandwidth of a device-to-device copy"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def write_plots(results: Results, stem: Path) -> list[Path]:
    """``<stem>-speedup-batch-256.png`` and so on, of what was measured."""
    label = CPU_LABEL if results.machine == CPU else results.machine
    paths = [_save(draw(), results.environments[-1], label, stem, name) for name, draw in _plots(results)]
    counts = results.of(PassCount)
    return paths + ([write_passes(counts, results.environments[-1], stem)] if counts else [])


def write_passes(counts: list[PassCount], versions: dict[str, Any], stem: Path) -> Path:
    """``<stem>-passes.png``: passes over memory, which are those of any machine."""
    label = "bfloat16, batch 256; ours counted from the kernels' loads and stores, eager's by a model of its operators"
    return _save(_passes(counts), versions, label, stem, "passes")


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


def _by_setting(times: list[T]) -> dict[str, list[T]]:
    """By dtype, layout, batch, and whether CUDA graphs were timed, in words."""
    found: dict[str, list[T]] = {}
    for t in times:
        graphs = ", CUDA graphs" if isinstance(t, NodeTime) and t.cuda_graph else ""
        found.setdefault(f"{t.dtype} {t.layout}, batch {t.batch}{graphs}", []).append(t)
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
    workloads = list(dict.fromkeys((t.network, t.mode, t.batch) for t in times))
    bars = max(sum((t.network, t.mode, t.batch) == w for t in times) for w in workloads)
    figure, panels = plt.subplots(
        len(workloads), figsize=(8, (0.28 * bars + 0.7) * len(workloads) + 0.3), squeeze=False, layout="constrained"
    )
    for workload, axes in zip(workloads, panels[:, 0], strict=True):
        network, mode, batch = workload
        of_it = [t for t in times if (t.network, t.mode, t.batch) == workload]
        colours = [
            COLOURS[0] if t.variant in networks.WAYS and networks.WAYS[t.variant].fused else "0.7" for t in of_it
        ]
        drawn = axes.barh([t.variant for t in of_it], [value(t) for t in of_it], color=colours)
        axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{network} {mode}, batch {batch}: {what}", loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _passes(counts: list[PassCount]) -> Any:
    """A panel for each form of node and one for the networks, a bar for each variant."""
    panels: dict[str, dict[str, list[PassCount]]] = {}
    for c in counts:
        of_a_node = c.phase in PHASES
        panel, group = (c.what, c.phase) if of_a_node else (f"{c.phase}, per normalised element", c.what)
        panels.setdefault(panel, {}).setdefault(group, []).append(c)
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 6), sharex=True, layout="constrained")
    for panel, (title, groups) in zip(axes.flat, panels.items(), strict=True):
        _pass_bars(panel, groups)
        panel.set_title(title, loc="left", fontsize=10)
    for panel in axes[1]:
        panel.set_xlabel("passes over memory: one reads or writes one activation once", fontsize=8)
    figure.suptitle(_fewer(counts), x=0.01, ha="left", fontsize=12, fontweight="bold")
    # Where bars are short.
    axes[0, 0].legend(loc="upper right", fontsize=9, frameon=False)
    return figure


def _pass_bars(axes: Any, groups: dict[str, list[PassCount]]) -> None:
    """Of each group a bar for each variant, with its figure and how many times fewer it is than the first's."""
    variants = list(dict.fromkeys(c.variant for group in groups.values() for c in group))
    middles = [i * (len(variants) + 1) + (len(variants) - 1) / 2 for i in range(len(groups))]
    for i, (variant, colour) in enumerate(zip(variants, ("0.7", COLOURS[0], COLOURS[5]), strict=True)):
        places = [middle - (len(variants) - 1) / 2 + i for middle in middles]
        passes = [group[i].passes for group in groups.values()]
        fewer = [group[0].passes / group[i].passes for group in groups.values()]
        drawn = axes.barh(places, passes, height=0.85, color=colour, label=variant)
        texts = [f"{p:.2f}" + (f"  ({f:.1f} times fewer)" if i else "") for p, f in zip(passes, fewer, strict=True)]
        axes.bar_label(drawn, texts, padding=3, fontsize=8)
    axes.set_yticks(middles, groups, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.spines[["top", "right"]].set_visible(False)


def _fewer(counts: list[PassCount]) -> str:
    """What was found of the last network."""
    network = counts[-1].what
    eager, *ours = [c.passes for c in counts if c.what == network]
    times = [f"{eager / passes:.1f}" for passes in ours]
    return (
        f"{network}: norms, additions and ReLUs of a training step move {times[0]} times less memory than in eager,\n"
        f"{times[1]} times less with one launch a direction"
    )


def _label(form: str, shape: str) -> str:
    return f"{form}  {shape}"
