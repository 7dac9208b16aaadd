"""Plain and residual networks of 20 and 56 layers: which of the deeper ones trains worse, on the training set itself?

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and figure 6: a deeper plain
network has the higher training error, although the shallower one's solution is among its own; a deeper residual network
has not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from training.images import Images
from workloads.networks import cifar_plain, cifar_resnet

import resfused
from science import figures
from science.agreement import QUICK, TINY, Comparison, as_record, compare, comparisons
from science.libraries import FUSED, REFERENCE
from science.network_passes import count_passes
from science.records import Content, rounded
from science.session import DEFAULT, FULL, SHORT, Session, Source, long_run, long_runs_on
from science.training import Curve, Recipe, train

NAME = "degradation"
KINDS = PLAIN, RESIDUAL = ("plain", "residual")
VARIANTS = (REFERENCE, FUSED)


@dataclass(frozen=True)
class Settings:
    """``recipe`` of the curves; ``agreement_*`` of the trainings that compare fused networks with the reference."""

    depths: tuple[int, int]
    widths: tuple[int, ...]
    recipe: Recipe
    seeds: int
    agreement_recipe: Recipe
    agreement_widths: tuple[int, ...] = (8, 16, 16)
    agreement_depth: int = 8


SETTINGS = {
    SHORT: Settings((8, 14), (8, 8, 8), Recipe(1, 128, 0.1, steps=4), 2, TINY),
    DEFAULT: Settings((20, 56), (8, 16, 32), Recipe(20, 64, 0.1), 3, QUICK),
    FULL: Settings((20, 56), (16, 32, 64), Recipe(160, 128, 0.1), 5, replace(QUICK, steps=40)),
}


@dataclass(frozen=True)
class Job:
    kind: str
    depth: int
    seed: int
    variant: str
    widths: tuple[int, ...]
    recipe: Recipe
    source: Source


def build(kind: str, depth: int, widths: tuple[int, ...], seed: int, variant: str, images: Images) -> nn.Module:
    """The network; a seed's weights are always the same. The fused one is the reference after ``fuse_``."""
    torch.manual_seed(seed)
    make = cifar_plain if kind == PLAIN else cifar_resnet
    network = make(depth, images.classes, images.channels, widths=widths)
    if variant == FUSED:
        resfused.fuse_(network)
    return network


def train_one(job: Job) -> Curve:
    images = job.source.load(job.seed)
    network = build(job.kind, job.depth, job.widths, job.seed, job.variant, images)
    with long_run() as device:
        return train(network.to(device), images, job.recipe, device, torch.float32)


def measure(session: Session) -> Content:
    """Every training, and what the claim says of them."""
    settings = SETTINGS[session.size]
    seeds = session.seeds_or(settings.seeds)
    jobs = _jobs(settings, seeds, session)
    curves = session.run(train_one, jobs, "Training plain and residual networks")
    agreements = session.run(compare, _comparisons(settings, session), "Fused against reference, step by step")
    runs = [
        {
            "network": f"{job.kind}-{job.depth}", "variant": job.variant, "seed": job.seed,
            "errors": rounded(curve.errors), "losses": rounded(curve.losses),
            "steps_per_epoch": curve.steps_per_epoch, "ms_per_step": round(curve.milliseconds_per_step, 3),
        }
        for job, curve in zip(jobs, curves, strict=True)
    ]  # fmt: skip
    images = session.source.load(0)
    passes = {}
    for kind, depth in product(KINDS, settings.depths):
        network = build(kind, depth, settings.widths, 0, REFERENCE, images)
        passes[f"{kind}-{depth}"] = asdict(count_passes(network, images.training[0][0]))
    return {
        "settings": {**asdict(settings), "seeds": seeds, "data": session.source.data},
        "fused_curves_on": long_runs_on(),
        "runs": runs,
        "full_length_difference": _full_length_difference(jobs, curves),
        "passes": passes,
        "agreements": [as_record(a) for a in agreements],
    }


def _jobs(settings: Settings, seeds: list[int], session: Session) -> list[Job]:
    """The longest first. Both variants everywhere on a GPU; on a CPU, where they are the same operators, of one seed's
    shallower networks."""
    jobs = []
    for depth in sorted(settings.depths, reverse=True):
        for seed, kind, variant in product(seeds, KINDS, VARIANTS):
            if variant == FUSED or session.on_gpu or (seed, depth) == (seeds[0], min(settings.depths)):
                jobs.append(Job(kind, depth, seed, variant, settings.widths, settings.recipe, session.source))
    return jobs


def _comparisons(settings: Settings, session: Session) -> list[Comparison]:
    """On a GPU at full length."""
    depth, widths, recipe = settings.agreement_depth, settings.agreement_widths, settings.agreement_recipe
    if session.on_gpu:
        depth, widths, recipe = settings.depths[0], settings.widths, settings.recipe
    networks = {
        f"{kind}-{depth}": tuple(partial(build, kind, depth, widths, 0, variant) for variant in VARIANTS)
        for kind in KINDS
    }
    return comparisons(networks, recipe, session)


def _full_length_difference(jobs: list[Job], curves: list[Curve]) -> dict[str, float]:
    """The largest difference of any step's loss between a seed's fused and its reference training, by network."""
    found: dict[str, float] = {}
    by_run = {(job.kind, job.depth, job.seed, job.variant): curve for job, curve in zip(jobs, curves, strict=True)}
    for (kind, depth, seed, variant), curve in by_run.items():
        if variant == REFERENCE:
            other = by_run[kind, depth, seed, FUSED]
            difference = max(abs(a - b) for a, b in zip(curve.losses, other.losses, strict=True))
            name = f"{kind}-{depth}"
            found[name] = max(found.get(name, 0.0), difference)
    return found


def final_errors(content: Content, network: str, variant: str = FUSED) -> list[float]:
    """Training error over the last epoch, by seed."""
    return [run["errors"][-1] for run in content["runs"] if (run["network"], run["variant"]) == (network, variant)]


def summary(content: Content) -> list[list[str]]:
    """Rows of the table: network, final errors by seed, mean, spread, passes, times."""
    rows = []
    for kind, depth in product(KINDS, content["settings"]["depths"]):
        name = f"{kind}-{depth}"
        errors = final_errors(content, name)
        passes = content["passes"][name]
        times = [_mean_ms(content, name, variant) for variant in VARIANTS[::-1]]
        rows.append([
            name, ", ".join(f"{error:.2%}" for error in errors), f"{mean(errors):.2%}",
            f"{min(errors):.2%} to {max(errors):.2%}", f"{passes['fused']:.2f} / {passes['eager']:.2f}",
            " / ".join(times),
        ])  # fmt: skip
    return rows


def _mean_ms(content: Content, network: str, variant: str) -> str:
    found = [run["ms_per_step"] for run in content["runs"] if (run["network"], run["variant"]) == (network, variant)]
    return f"{mean(found):.0f}" if found else "not run"


HEADINGS = ("network", "final training error, each seed", "mean", "least to greatest",
            "passes per element, fused / reference", "ms a step, fused / reference")  # fmt: skip


def title(content: Content) -> str:
    return f"Degradation: training error over the last epoch, fused curves on {content['fused_curves_on']}"


def findings(content: Content) -> list[str]:
    """Of each kind, whether its deeper network ends with the higher training error."""
    shallow, deep = content["settings"]["depths"]
    found = []
    for kind in KINDS:
        ends = {depth: final_errors(content, f"{kind}-{depth}") for depth in (shallow, deep)}
        worse = sum(b > a for a, b in zip(ends[shallow], ends[deep], strict=True))
        found.append(
            f"{kind.capitalize()} networks: {deep} layers end at {mean(ends[deep]):.2%}, {shallow} layers at "
            f"{mean(ends[shallow]):.2%}; the deeper trains worse in {worse} of {len(ends[deep])} seeds."
        )
    run = content["runs"][0]
    images = run["steps_per_epoch"] * content["settings"]["recipe"]["batch_size"]
    found.append(f"One image is {1 / images:.2%} of an epoch's {images:,}.")
    return found + [
        f"{network}, a whole training in float32: the losses of fused, on {content['fused_curves_on']}, and reference "
        f"differ by at most {difference:.2g}."
        for network, difference in content["full_length_difference"].items()
    ]


def draw(content: Content, folder: Path) -> Path:
    shallow, deep = content["settings"]["depths"]
    plain, residual = (mean(final_errors(content, f"{kind}-{deep}")) for kind in KINDS)
    title = f"{deep} layers: a plain network ends at {plain:.1%} training error, a residual one at {residual:.2%}"
    figure, axes = figures.panels(1, 2, 11, 4.4, title)
    for panel, kind in zip(axes[0], KINDS, strict=True):
        labels = []
        for depth, colour in ((shallow, figures.BLUE), (deep, figures.VERMILION)):
            runs = [r for r in content["runs"] if (r["network"], r["variant"]) == (f"{kind}-{depth}", FUSED)]
            percent = [[100 * error for error in run["errors"]] for run in runs]
            steps = [runs[0]["steps_per_epoch"] * (epoch + 1) for epoch in range(len(percent[0]))]
            figures.with_spread(panel, steps, percent, colour)
            end = mean(curve[-1] for curve in percent)
            labels.append((end, f"{depth} layers: {end:.2f} %", colour))
        panel.set_title(f"{kind} networks, {len(content['settings']['seeds'])} seeds")
        panel.set_xlabel("training step")
        panel.set_ylabel("training error, %")
        panel.set_ylim(-4, 95)
        figures.label_ends(panel, steps[-1], labels)
    return figures.save(figure, folder, NAME)
