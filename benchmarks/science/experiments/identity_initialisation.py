"""A block with a small last-norm weight is nearly relu(x); with a zero one it is that, and so are a hundred in a row.

Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 5.1, starts the weight of each
block's last BatchNorm at zero: ``zero_init_residual`` of torchvision's networks and of this library's blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from training.images import Images
from workloads.networks import cifar_resnet

import resfused
from resfused import reference
from science import figures
from science.agreement import QUICK, TINY, Comparison, as_record, compare, comparisons
from science.libraries import FUSED, LIBRARIES, REFERENCE
from science.network_passes import as_sentence, count_passes
from science.records import Content, rounded
from science.session import DEFAULT, FULL, SHORT, Session, Source, placed
from science.training import Recipe, first_batch

NAME = "identity_initialisation"
ZERO_INIT = "zero_init_residual"


@dataclass(frozen=True)
class Settings:
    """``weights``: of each block's last norm, beside ``zero_init_residual``. ``apart``: every how many blocks one is
    also measured alone."""

    blocks: int
    apart: int
    channels: int
    images: int
    weights: tuple[float, ...]
    seeds: int
    widths: tuple[int, ...]
    recipe: Recipe
    agreement_recipe: Recipe
    agreement_widths: tuple[int, ...] = (8, 16, 16)
    agreement_depth: int = 8


SETTINGS = {
    SHORT: Settings(2, 2, 8, 2, (0.1,), 1, (8, 8, 8), Recipe(1, 4, 0.05, steps=2), TINY),
    DEFAULT: Settings(
        100, 10, 8, 2, (1.0, 0.1, 0.01), 1, (8, 16, 32), Recipe(20, 64, 0.1), QUICK
    ),
    FULL: Settings(
        100, 10, 64, 16, (1.0, 0.3, 0.1, 0.03, 0.01), 3, (16, 32, 64), Recipe(160, 128, 0.1),
        replace(QUICK, steps=40),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """``weight`` None: ``zero_init_residual``."""

    library: str
    weight: float | None
    seed: int
    settings: Settings
    source: Source
    device: torch.device


@dataclass(frozen=True)
class Deviation:
    """||block(x) - relu(x)|| / ||x|| of single blocks on the same x, and of the stack up to each block."""

    each: list[float]
    stack: list[float]


def stack_of(library: ModuleType, blocks: int, channels: int, weight: float | None, seed: int) -> nn.Sequential:
    """Blocks with random convolutions, their last norm's weight ``weight``, or zero by ``zero_init_residual``."""
    torch.manual_seed(seed)
    made = [library.ResidualBlock(channels, zero_init_residual=weight is None) for _ in range(blocks)]
    if weight is not None:
        for block in made:
            nn.init.constant_(block.bn2.weight, weight)
    return nn.Sequential(*made)


def deviations(stack: nn.Sequential, x: Tensor, apart: int = 1) -> Deviation:
    """In training mode, x being (N, C, H, W); every ``apart``-th block is measured alone."""
    target, scale = torch.relu(x), x.norm()
    each, through = [], []
    h = x
    with torch.no_grad():
        for number, block in enumerate(stack):
            h = block(h)
            through.append(float((h - target).norm() / scale))
            if number % apart == 0:
                each.append(float((block(x) - target).norm() / scale))
    return Deviation(each, through)


def features(images: Images, count: int, channels: int, seed: int, device: torch.device) -> Tensor:
    """Real images after a random convolution and a norm: (count, channels, H, W) of either sign, in float64."""
    torch.manual_seed(seed)
    x, _ = first_batch(images, count, device, torch.float64)
    stem = nn.Sequential(nn.Conv2d(images.channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    with torch.no_grad():
        return stem.to(device, torch.float64)(x)


def measure_one(job: Job) -> Deviation:
    s = job.settings
    x = features(job.source.load(job.seed), s.images, s.channels, job.seed, job.device)
    stack = placed(
        stack_of(LIBRARIES[job.library], s.blocks, s.channels, job.weight, job.seed), job.device, torch.float64
    )
    with resfused.use_backend("triton"):
        return deviations(stack, x, s.apart)


def build(depth: int, widths: tuple[int, ...], library: str, images: Images) -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(
        depth, images.classes, images.channels, widths=widths, blocks=LIBRARIES[library], zero_init_residual=True
    )  # fmt: skip


def measure(session: Session) -> Content:
    settings = SETTINGS[session.size]
    seeds = session.seeds_or(settings.seeds)
    jobs = [
        Job(library, weight, seed, settings, session.source, session.device)
        for seed, library, weight in product(seeds, reversed(LIBRARIES), (*settings.weights, None))
    ]
    found = session.run(measure_one, jobs, "Blocks near the identity")
    agreements = session.run(compare, _comparisons(settings, session), "Fused against reference, step by step")
    images = session.source.load(0)
    example = torch.zeros(settings.channels, *images.training[0][0].shape[-2:])
    passes = count_passes(stack_of(reference, settings.blocks, settings.channels, None, 0), example)
    return {
        "settings": {**asdict(settings), "seeds": seeds, "data": session.source.data},
        "kernels": session.kernels,
        "runs": [
            {"blocks": job.library, "weight": ZERO_INIT if job.weight is None else job.weight, "seed": job.seed,
             "each": rounded(deviation.each, 17), "stack": rounded(deviation.stack, 17)}
            for job, deviation in zip(jobs, found, strict=True)
        ],
        "passes": {f"{settings.blocks} blocks": asdict(passes)},
        "agreements": [as_record(a) for a in agreements],
    }  # fmt: skip


def _comparisons(settings: Settings, session: Session) -> list[Comparison]:
    """On a GPU at full length, and deeper."""
    depth, widths, recipe = settings.agreement_depth, settings.agreement_widths, settings.agreement_recipe
    if session.on_gpu:
        depth, widths, recipe = 20, settings.widths, settings.recipe
    networks = {f"{ZERO_INIT}-{depth}": tuple(partial(build, depth, widths, library) for library in LIBRARIES)}
    return comparisons(networks, recipe, session)


def runs_of(content: Content, blocks: str, weight: float | str) -> list[dict[str, Any]]:
    return [run for run in content["runs"] if (run["blocks"], run["weight"]) == (blocks, weight)]


def weights_of(content: Content) -> list[float | str]:
    return [*content["settings"]["weights"], ZERO_INIT]


HEADINGS = ("last norm's weight", "one block, mean", "the whole stack", "fused against reference, largest difference")


def summary(content: Content) -> list[list[str]]:
    rows = []
    for weight in weights_of(content):
        fused, exact = runs_of(content, FUSED, weight), runs_of(content, REFERENCE, weight)
        each = [value for run in fused for value in run["each"]]
        stacks = [run["stack"][-1] for run in fused]
        difference = max(
            abs(a - b) for ours, theirs in zip(fused, exact, strict=True)
            for path in ("each", "stack") for a, b in zip(ours[path], theirs[path], strict=True)
        )  # fmt: skip
        rows.append([str(weight), f"{mean(each):.3g}", f"{mean(stacks):.3g}", f"{difference:.1g}"])
    return rows


def title(content: Content) -> str:
    return (
        f"Identity initialisation: ||block(x) - relu(x)|| / ||x||, {content['settings']['blocks']} blocks, "
        f"fused ones on the {content['kernels']}, float64"
    )


def findings(content: Content) -> list[str]:
    found = [as_sentence(network, passes) for network, passes in content["passes"].items()]
    weights = content["settings"]["weights"]
    for larger, smaller in pairwise(weights):
        means = [mean(value for run in runs_of(content, FUSED, w) for value in run["each"]) for w in (larger, smaller)]
        ratio = means[0] / means[1]
        found.append(f"From weight {larger:g} to {smaller:g} the deviation of one block falls {ratio:.3g}-fold.")
    zero = max(value for run in runs_of(content, FUSED, ZERO_INIT) for value in run["each"] + run["stack"])
    return [*found, f"With `{ZERO_INIT}` the largest deviation of any block or stack of fused blocks is {zero:g}."]


def draw(content: Content, folder: Path) -> Path:
    blocks = content["settings"]["blocks"]
    zero = max(value for run in runs_of(content, FUSED, ZERO_INIT) for value in run["stack"])
    title = f"{blocks} blocks with zero last-norm weights differ from relu(x) by {zero:.1g}"
    figure, axes = figures.panels(1, 2, 11, 4.4, title)
    for panel, path in zip(axes[0], ("each", "stack"), strict=True):
        labels = []
        apart = content["settings"]["apart"] if path == "each" else 1
        for weight, colour in zip(weights_of(content)[::-1], figures.SEQUENCE, strict=False):
            curves = [run[path] for run in runs_of(content, FUSED, weight)]
            numbers = range(1, 1 + apart * len(curves[0]), apart)
            figures.with_spread(panel, numbers, curves, colour, marker="o" if path == "each" else None, markersize=4)
            text = f"weight {weight:g}" if isinstance(weight, float) else "weight 0"
            labels.append((curves[0][-1], text, colour))
        # Zeros have their place on this axis, below the smallest weight's.
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.set_ylim(-3e-4, None)
        figures.label_ends(panel, numbers[-1], labels)
        panel.set_title("single blocks, each on the same x" if path == "each" else "a stack, up to each block")
        panel.set_xlabel("block")
        panel.set_ylabel(f"||{'block' if path == 'each' else 'stack'}(x) - relu(x)|| / ||x||")
    return figures.save(figure, folder, NAME)
