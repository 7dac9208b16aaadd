"""What one gains on a CPU, in a line and in a picture: nodes of ResNet-50 and whole networks against the others."""

from __future__ import annotations

from typing import Any

from measure import network_timing as networks
from measure.variants import COMPILED, EAGER
from record.results import NetworkTime, NodeTime, Results
from workloads.passes import BOTH

from report import pyplot as plt
from report.goals import geometric_mean, of_resnet50, ratios

# Of Okabe and Ito, which colour-blind readers tell apart.
COLOURS = {EAGER: "#E69F00", COMPILED: "#009E73", networks.OURS: "#0072B2", networks.OURS_COMPILED: "#56B4E9"}


def of_nodes(results: Results) -> dict[tuple[str, str], list[NodeTime]]:
    """Forward + backward of ResNet-50's nodes with the C library's default, by dtype and layout."""
    found: dict[tuple[str, str], list[NodeTime]] = {}
    for t in results.of(NodeTime):
        if of_resnet50(t) and t.phase == BOTH and not t.kept_mapped:
            found.setdefault((t.dtype, t.layout), []).append(t)
    return found


def headline(results: Results) -> str:
    """Geometric means over every node, dtype and layout; empty where none was timed."""
    parts = []
    for other in (EAGER, COMPILED):
        found = [ratio for times in of_nodes(results).values() for ratio in ratios(times, other).values()]
        mean = geometric_mean(found)
        if mean is not None:
            parts.append(f"{mean:.1f} times as fast as {other} ({len(found)} timed)")
    return f"ResNet-50's nodes, forward + backward: {', '.join(parts)}" if parts else ""


def draw(results: Results) -> Any:
    """A panel of nodes for each dtype and layout, and one of networks where they were timed."""
    by_setting, steps = of_nodes(results), _step_ratios(results)
    labels = list(dict.fromkeys(f"{t.form}  {t.shape}" for times in by_setting.values() for t in times))
    heights = [0.24 * len(labels) + 1.0, 0.2 * sum(len(of) + 1 for of in steps.values()) + 0.6]
    figure = plt.figure(figsize=(10.5, sum(heights[: 1 + bool(steps)]) + 0.5), layout="constrained")
    figure.suptitle(headline(results).replace(": ", ":\n"), x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(1 + bool(steps), len(by_setting), height_ratios=heights[: 1 + bool(steps)])
    panels = grid[0, :].subgridspec(1, len(by_setting)).subplots(sharex=True, sharey=True, squeeze=False)[0]
    for axes, (setting, times) in zip(panels, by_setting.items(), strict=True):
        _node_panel(axes, times, labels)
        axes.set_title(" ".join(setting), loc="left", fontsize=10)
    # The panels share it, and scale it until it is set.
    panels[0].set_xlim(left=0)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="upper right", frameon=False)
    if steps:
        _step_panel(figure.add_subplot(grid[1, :]), steps)
    return figure


def _node_panel(axes: Any, times: list[NodeTime], labels: list[str]) -> None:
    for other in (EAGER, COMPILED):
        found = ratios(times, other)
        rows = [labels.index(f"{form}  {shape}") for form, shape, *_ in found]
        axes.scatter(found.values(), rows, s=30, color=COLOURS[other], label=f"against {other}")
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("times as fast, node by node", fontsize=8)
    _plain(axes)


def _step_ratios(results: Results) -> dict[str, dict[str, float]]:
    """How many times as fast as eager each way runs each workload, by their names."""
    by_workload: dict[tuple[str, str, int, str], dict[str, float]] = {}
    for t in results.of(NetworkTime):
        by_workload.setdefault(t.workload, {})[t.variant] = t.milliseconds
    return {
        f"{network} {mode}, {dtype}, batch {batch}": {
            way: times[EAGER] / times[way] for way in (COMPILED, networks.OURS, networks.OURS_COMPILED) if way in times
        }
        for (network, mode, batch, dtype), times in by_workload.items()
        if EAGER in times
    }


def _step_panel(axes: Any, steps: dict[str, dict[str, float]]) -> None:
    place, middles = 0.0, []
    named = set()
    for of in steps.values():
        middles.append(place + (len(of) - 1) / 2)
        for way, ratio in of.items():
            label = None if way in named else way
            named.add(way)
            drawn = axes.barh(place, ratio, height=0.85, color=COLOURS[way], label=label)
            axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
            place += 1
        place += 1
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(middles, steps, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("Whole networks: times as fast as eager", loc="left", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
