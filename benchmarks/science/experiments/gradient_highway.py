"""The loss gradient from the last block to the first, plain against residual, before and after training.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, section 2: the gradient at a block's
input is what comes through its branch plus what comes straight from its output.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn
from training.images import Images
from workloads.networks import cifar_plain, cifar_resnet

import resfused
from science import figures
from science.agreement import QUICK, TINY, Comparison, as_record, compare, comparisons
from science.gradients import Profile, profile
from science.libraries import FUSED, LIBRARIES, REFERENCE
from science.network_passes import as_sentence, count_passes
from science.records import Content, rounded
from science.session import DEFAULT, FULL, SHORT, Session, Source, long_run, long_runs_on, placed
from science.training import Recipe, first_batch, train

NAME = "gradient_highway"
KINDS = PLAIN, RESIDUAL = ("plain", "residual")
TIMES = BEFORE, AFTER = ("at initialisation", "after training")


@dataclass(frozen=True)
class Settings:
    """Gradients are of a batch of ``measured`` images; ``kernel_*``: where the kernels' are compared with them."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    recipe: Recipe
    seeds: int
    measured: int
    kernel_depths: tuple[int, ...]
    kernel_images: int
    agreement_recipe: Recipe
    agreement_widths: tuple[int, ...] = (8, 16, 16)
    agreement_depth: int = 8


SETTINGS = {
    SHORT: Settings((8, 14), (8, 8, 8), Recipe(1, 64, 0.1, steps=2), 2, 16, (8,), 2, TINY),
    DEFAULT: Settings(
        (20, 56, 110), (8, 16, 32), Recipe(5, 64, 0.1), 3, 256, (20, 56, 110), 2, QUICK
    ),
    FULL: Settings(
        (20, 56, 110), (16, 32, 64), Recipe(160, 128, 0.1), 5, 1024, (20, 56, 110), 8, replace(QUICK, steps=40)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    kind: str
    depth: int
    seed: int
    settings: Settings
    source: Source


@dataclass(frozen=True)
class KernelJob:
    """Gradients of a network at initialisation, with blocks of the kernels and of the reference."""

    depth: int
    settings: Settings
    source: Source
    device: torch.device


def build(kind: str, depth: int, widths: tuple[int, ...], seed: int, library: str, images: Images) -> nn.Sequential:
    """Residual networks of the blocks of ``library``; a seed's weights are always the same."""
    torch.manual_seed(seed)
    if kind == PLAIN:
        return cifar_plain(depth, images.classes, images.channels, widths=widths)
    return cifar_resnet(depth, images.classes, images.channels, widths=widths, blocks=LIBRARIES[library])


def measure_one(job: Job) -> dict[str, Profile]:
    """Before and after training, in float64."""
    s = job.settings
    images = job.source.load(job.seed)
    with long_run() as device:
        network = build(job.kind, job.depth, s.widths, job.seed, FUSED, images).to(device)
        x, labels = first_batch(images, s.measured, device, torch.float64)
        before = profile(copy.deepcopy(network).double(), x, labels)
        train(network, images, s.recipe, device, torch.float32)
        return {BEFORE: before, AFTER: profile(copy.deepcopy(network).double(), x, labels)}


def compare_gradients(job: KernelJob) -> float:
    """The largest relative difference of any block's norms, kernels against reference, in float64."""
    s = job.settings
    images = job.source.load(0)
    x, labels = first_batch(images, s.kernel_images, job.device, torch.float64)
    found = []
    for library in (FUSED, REFERENCE):
        network = placed(build(RESIDUAL, job.depth, s.widths, 0, library, images), job.device, torch.float64)
        with resfused.use_backend("triton"):
            found.append(asdict(profile(network, x, labels)))
    fused, exact = found
    return max(abs(a - b) / b for path in exact for a, b in zip(fused[path], exact[path], strict=True))


def measure(session: Session) -> Content:
    settings = SETTINGS[session.size]
    seeds = session.seeds_or(settings.seeds)
    jobs = [
        Job(kind, depth, seed, settings, session.source)
        for depth, seed, kind in product(sorted(settings.depths, reverse=True), seeds, KINDS)
    ]
    profiles = session.run(measure_one, jobs, "Gradients of plain and residual networks")
    kernel_jobs = [KernelJob(d, settings, session.source, session.device) for d in sorted(settings.kernel_depths)]
    differences = session.run(compare_gradients, kernel_jobs[::-1], "Gradients through the kernels")[::-1]
    agreements = session.run(compare, _comparisons(settings, session), "Fused against reference, step by step")
    images = session.source.load(0)
    network = build(RESIDUAL, settings.depths[0], settings.widths, 0, REFERENCE, images)
    return {
        "settings": {**asdict(settings), "seeds": seeds, "data": session.source.data},
        "fused_curves_on": long_runs_on(),
        "runs": [
            {"kind": job.kind, "depth": job.depth, "seed": job.seed, "time": time,
             **{path: rounded(norms, 4) for path, norms in asdict(found).items()}}
            for job, times in zip(jobs, profiles, strict=True) for time, found in times.items()
        ],
        "kernels": session.kernels,
        "kernel_differences": {str(j.depth): d for j, d in zip(kernel_jobs, differences, strict=True)},
        "passes": {f"residual-{settings.depths[0]}": asdict(count_passes(network, images.training[0][0]))},
        "agreements": [as_record(a) for a in agreements],
    }  # fmt: skip


def _comparisons(settings: Settings, session: Session) -> list[Comparison]:
    """On a GPU at full length."""
    depth, widths, recipe = settings.agreement_depth, settings.agreement_widths, settings.agreement_recipe
    if session.on_gpu:
        depth, widths, recipe = settings.depths[0], settings.widths, settings.recipe
    networks = {
        f"residual-{depth}": tuple(
            partial(build, RESIDUAL, depth, widths, 0, library) for library in (REFERENCE, FUSED)
        )
    }
    return comparisons(networks, recipe, session)


def ratios(content: Content, kind: str, depth: int, time: str, path: str = "whole") -> list[float]:
    """Of each seed: the gradient at the first block's input over that at the last block's."""
    return [run[path][0] / run["whole"][-1] for run in _runs(content, kind, depth, time)]


def _runs(content: Content, kind: str, depth: int, time: str) -> list[dict[str, Any]]:
    return [r for r in content["runs"] if (r["kind"], r["depth"], r["time"]) == (kind, depth, time)]


HEADINGS = ("layers", "when", "plain", "residual", "residual, shortcuts alone")


def summary(content: Content) -> list[list[str]]:
    """First block's gradient over the last block's: the geometric mean over seeds, and the least to the greatest."""
    rows = []
    for depth, time in product(content["settings"]["depths"], TIMES):
        cells = [
            ratios(content, PLAIN, depth, time),
            ratios(content, RESIDUAL, depth, time),
            ratios(content, RESIDUAL, depth, time, "shortcuts_only"),
        ]
        rows.append([str(depth), time, *map(_with_range, cells)])
    return rows


def _fold(value: float) -> str:
    """Two significant digits, without an exponent where it is large."""
    return f"{value:.2g}" if value < 100 else f"{float(f'{value:.2g}'):,.0f}"


def _with_range(values: list[float]) -> str:
    if min(values) <= 0:
        return f"{min(values):.2g} to {max(values):.2g}"
    return f"{_fold(geometric_mean(values))} ({_fold(min(values))} to {_fold(max(values))})"


def title(content: Content) -> str:
    return (
        "Gradient highway: norm of the loss gradient, first block's input over last block's, fused curves on "
        + content["fused_curves_on"]
    )


def findings(content: Content) -> list[str]:
    found = [as_sentence(network, passes) for network, passes in content["passes"].items()]
    for depth, time in product(content["settings"]["depths"], TIMES):
        plain, residual = (geometric_mean(ratios(content, kind, depth, time)) for kind in KINDS)
        found.append(
            f"{depth} layers, {time}: {_fold(plain)}-fold without shortcuts, {_fold(residual)}-fold with them."
        )
    return found + [
        f"{depth} layers, fused blocks on the {content['kernels']}, float64: no norm, of the whole or of a path, "
        f"differs from the reference blocks' by more than {difference:.1e} of it."
        for depth, difference in content["kernel_differences"].items()
    ]


LINES = (
    (PLAIN, "whole", "plain: the whole gradient", figures.VERMILION, "-"),
    (RESIDUAL, "whole", "residual: the whole gradient", figures.BLUE, "-"),
    (RESIDUAL, "direct", "residual: each block's direct term", figures.ORANGE, "--"),
    (RESIDUAL, "shortcuts_only", "residual: through shortcuts alone", figures.GREEN, ":"),
)


def draw(content: Content, folder: Path) -> Path:
    depths = content["settings"]["depths"]
    plain, residual = (geometric_mean(ratios(content, kind, depths[-1], BEFORE)) for kind in KINDS)
    title = (
        f"The gradient on its way through {depths[-1]} layers at initialisation: x {_fold(plain)} without shortcuts, "
        f"x {_fold(residual)} with them"
    )
    figure, axes = figures.panels(2, len(depths), 12, 7, title)
    for row, time in zip(axes, TIMES, strict=True):
        for panel, depth in zip(row, depths, strict=True):
            _draw_profiles(panel, content, depth, time)
        # One scale for a row.
        limits = [limit for panel in row for limit in panel.get_ylim()]
        for panel in row:
            panel.set_ylim(min(limits), max(limits))
        row[0].set_ylabel("gradient norm / last block's")
    # Where the curves of the shallowest network leave room under the scale of the deepest.
    axes[0][0].legend(frameon=False, loc="upper left", fontsize=9)
    return figures.save(figure, folder, NAME)


def _draw_profiles(axes: Any, content: Content, depth: int, time: str) -> None:
    """Relative to the whole gradient at the last block's input, from the last block on the left to the first."""
    for kind, path, text, colour, style in LINES:
        curves = [
            [value / run["whole"][-1] for value in reversed(run[path])] for run in _runs(content, kind, depth, time)
        ]
        figures.with_spread(
            axes, range(1, len(curves[0]) + 1), curves, colour, geometric_mean, linestyle=style, label=text
        )
    axes.set_yscale("log")
    axes.set_title(f"{depth} layers, {time}")
    axes.set_xlabel("block, from the last to the first")
