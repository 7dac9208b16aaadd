"""Fully connected residual networks whose shortcuts are identities, linear projections, or projections with a norm.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 3.2, equations 1 and 2, and
section 4.1, options B and C: identities wherever the shape stays, or projections everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import cast

import torch
from torch import Tensor, nn
from training.images import Images

import resfused
from resfused.norms import forked_tail
from science import figures
from science.agreement import QUICK, Comparison, as_record, compare, comparisons
from science.libraries import FUSED, LIBRARIES, REFERENCE
from science.network_passes import count_passes
from science.records import Content, rounded
from science.session import DEFAULT, FULL, SHORT, Session, Source, long_run, long_runs_on
from science.training import Curve, Recipe, accuracy, train

NAME = "shortcut_forms"
IDENTITY, LINEAR, PROJECTION = FORMS = ("identity", "linear projection", "projection with norm")
# Of a block's activations, by the projection itself: forward x in, s out; backward ds twice, x, dx. Each operator is
# taken to read its inputs once and to write its output once, as in traffic.eager_passes.
PROJECTION_PASSES = 6


@dataclass(frozen=True)
class Settings:
    """``blocks`` of ``width`` features, after a first one that changes the images' pixels to that width."""

    blocks: int
    width: int
    recipe: Recipe
    seeds: int
    agreement_blocks: int
    agreement_width: int
    agreement_recipe: Recipe


SETTINGS = {
    SHORT: Settings(1, 16, Recipe(1, 64, 0.05, steps=4), 2, 1, 8, replace(QUICK, batch_size=4, steps=2)),
    DEFAULT: Settings(8, 128, Recipe(20, 64, 0.05), 5, 1, 32, replace(QUICK, batch_size=32)),
    FULL: Settings(16, 512, Recipe(100, 64, 0.05), 10, 2, 32, replace(QUICK, batch_size=32, steps=40)),
}


@dataclass(frozen=True)
class Job:
    form: str
    library: str
    seed: int
    settings: Settings
    source: Source


@dataclass(frozen=True)
class Result:
    curve: Curve
    accuracy: float


class NormedProjectionBlock(resfused.LinearResidualBlock):
    """``LinearResidualBlock`` whose shortcut is a linear layer and a norm: both norms in one fused tail."""

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        projection, norm = cast(tuple[nn.Linear, nn.BatchNorm1d], self.shortcut)
        out = resfused.tail(self.bn1, self.fc1(x))
        return forked_tail(self.bn2, self.fc2(out), projection(shortcut), norm, forked=forked)


def block_of(form: str, features: int, library: str) -> nn.Module:
    """(N, features) in and out; the block of ``library``."""
    fused_projection = form == PROJECTION and library == FUSED
    block: nn.Module = (NormedProjectionBlock if fused_projection else LIBRARIES[library].LinearResidualBlock)(features)
    if form != IDENTITY:
        projection = nn.Linear(features, features, bias=False)
        block.shortcut = projection if form == LINEAR else nn.Sequential(projection, nn.BatchNorm1d(features))
    return block


def build(form: str, blocks: int, width: int, seed: int, library: str, images: Images) -> nn.Sequential:
    """(N, C, H, W) in, (N, classes) out. The branches of a seed are the same in every form and of either library."""
    pixels = images.training[0][0].numel()
    torch.manual_seed(seed)
    layers: list[nn.Module] = [LIBRARIES[library].LinearResidualBlock(pixels, width)]
    layers += [block_of(IDENTITY, width, library) for _ in range(blocks)]
    head = nn.Linear(width, images.classes)
    # Shortcuts are drawn last, so that they change no other random number.
    for i in range(1, 1 + blocks):
        branch = layers[i].state_dict()
        layers[i] = block_of(form, width, library)
        layers[i].load_state_dict(branch, strict=False)
    chain = getattr(LIBRARIES[library], "Sequential", nn.Sequential)
    network: nn.Sequential = chain(nn.Flatten(), *layers, head)
    return network


def train_one(job: Job) -> Result:
    s = job.settings
    images = job.source.load(job.seed)
    network = build(job.form, s.blocks, s.width, job.seed, job.library, images)
    with long_run() as device:
        curve = train(network.to(device), images, s.recipe, device, torch.float32)
        return Result(curve, accuracy(network, images, device, torch.float32, s.recipe.batch_size))


def measure(session: Session) -> Content:
    settings = SETTINGS[session.size]
    seeds = session.seeds_or(settings.seeds)
    jobs = _jobs(settings, seeds, session)
    results = session.run(train_one, jobs, "Training with each shortcut")
    agreements = session.run(compare, _comparisons(settings, session), "Fused against reference, step by step")
    images = session.source.load(0)
    networks = {form: build(form, settings.blocks, settings.width, 0, REFERENCE, images) for form in FORMS}
    return {
        "settings": {**asdict(settings), "seeds": seeds, "data": session.source.data},
        "fused_curves_on": long_runs_on(),
        "runs": [
            {"form": job.form, "blocks": job.library, "seed": job.seed, "accuracy": result.accuracy,
             "errors": rounded(result.curve.errors), "ms_per_step": round(result.curve.milliseconds_per_step, 3)}
            for job, result in zip(jobs, results, strict=True)
        ],
        "full_length_difference": _full_length_difference(jobs, results),
        "parameters": {form: sum(p.numel() for p in network.parameters()) for form, network in networks.items()},
        "passes": {form: asdict(count_passes(n, images.training[0][0])) for form, n in networks.items()},
        "agreements": [as_record(a) for a in agreements],
    }  # fmt: skip


def _jobs(settings: Settings, seeds: list[int], session: Session) -> list[Job]:
    """Both libraries everywhere on a GPU; on a CPU, where they are the same operators, of one seed."""
    return [
        Job(form, library, seed, settings, session.source)
        for seed, form, library in product(seeds, FORMS, LIBRARIES)
        if library == FUSED or session.on_gpu or seed == seeds[0]
    ]


def _comparisons(settings: Settings, session: Session) -> list[Comparison]:
    """On a GPU at full length and size."""
    blocks, width, recipe = settings.agreement_blocks, settings.agreement_width, settings.agreement_recipe
    if session.on_gpu:
        blocks, width, recipe = settings.blocks, settings.width, settings.recipe
    networks = {form: tuple(partial(build, form, blocks, width, 0, library) for library in LIBRARIES) for form in FORMS}
    return comparisons(networks, recipe, session)


def _full_length_difference(jobs: list[Job], results: list[Result]) -> dict[str, float]:
    """The largest difference of any step's loss between fused and reference training of a seed, by form."""
    losses = {(job.form, job.library, job.seed): result.curve.losses for job, result in zip(jobs, results, strict=True)}
    return {
        form: max(
            abs(a - b)
            for job in jobs if (job.form, job.library) == (form, REFERENCE)
            for a, b in zip(losses[form, FUSED, job.seed], losses[form, REFERENCE, job.seed], strict=True)
        )
        for form in FORMS
    }  # fmt: skip


def accuracies(content: Content, form: str, blocks: str = FUSED) -> list[float]:
    return [run["accuracy"] for run in content["runs"] if (run["form"], run["blocks"]) == (form, blocks)]


HEADINGS = ("shortcut", "parameters", "passes per element, fused / reference", "the projections' own passes a block",
            "validation accuracy, mean", "least to greatest", "ms a step, fused / reference")  # fmt: skip


def summary(content: Content) -> list[list[str]]:
    rows = []
    for form in FORMS:
        found, passes = accuracies(content, form), content["passes"][form]
        times = [
            mean(run["ms_per_step"] for run in content["runs"] if (run["form"], run["blocks"]) == (form, blocks))
            for blocks in (FUSED, REFERENCE)
        ]
        rows.append([
            form, f"{content['parameters'][form]:,}", f"{passes['fused']:.2f} / {passes['eager']:.2f}",
            "0" if form == IDENTITY else str(PROJECTION_PASSES), f"{mean(found):.2%}",
            f"{min(found):.2%} to {max(found):.2%}", f"{times[0]:.1f} / {times[1]:.1f}",
        ])  # fmt: skip
    return rows


def title(content: Content) -> str:
    blocks = content["settings"]["blocks"]
    return f"Shortcut forms: {blocks} fully connected blocks, equal steps, fused curves on {content['fused_curves_on']}"


def overlaps(content: Content, form: str) -> bool:
    """Whether the seeds' accuracies of a form and those of identities lie among each other."""
    found, others = accuracies(content, form), accuracies(content, IDENTITY)
    return min(found) <= max(others) and min(others) <= max(found)


def findings(content: Content) -> list[str]:
    found = []
    for form in FORMS[1:]:
        pairs = zip(accuracies(content, form), accuracies(content, IDENTITY), strict=True)
        differences = [a - b for a, b in pairs]
        found.append(
            f"{form.capitalize()} against identity: {'no' if overlaps(content, form) else 'a'} clear difference in "
            f"validation accuracy; seed by seed {mean(differences):+.2%} on average ({min(differences):+.2%} to "
            f"{max(differences):+.2%})."
        )
    return found + [
        f"{form}, whole trainings in float32: the losses of fused, on {content['fused_curves_on']}, and reference "
        f"differ by at most {difference:.2g}."
        for form, difference in content["full_length_difference"].items()
    ]


def draw(content: Content, folder: Path) -> Path:
    clear = [form for form in FORMS[1:] if not overlaps(content, form)]
    means = ", ".join(f"{mean(accuracies(content, form)):.1%} with {form}" for form in (IDENTITY, *clear))
    figure, axes = figures.panels(
        1, 2, 11, 4.4,
        f"Validation accuracy at equal steps: {means}" if clear
        else "No clear difference between the forms of shortcuts; identities have the fewest parameters",
    )  # fmt: skip
    errors, cost = axes[0]
    for form, colour in zip(FORMS, (figures.BLUE, figures.VERMILION, figures.GREEN), strict=True):
        runs = [run for run in content["runs"] if (run["form"], run["blocks"]) == (form, FUSED)]
        percent = [[100 * error for error in run["errors"]] for run in runs]
        figures.with_spread(errors, range(1, len(percent[0]) + 1), percent, colour, label=form)
        found = [100 * a for a in accuracies(content, form)]
        position = FORMS.index(form)
        cost.plot([position] * len(found), found, "o", color=colour, alpha=0.5)
        cost.plot(position, mean(found), "_", color=colour, markersize=26, markeredgewidth=2.5)
    errors.set_yscale("symlog", linthresh=0.1)
    errors.set_ylim(0, 100)
    errors.legend(frameon=False)
    errors.set_title(f"training, {len(content['settings']['seeds'])} seeds")
    errors.set_xlabel("epoch")
    errors.set_ylabel("training error, %")
    cost.set_title("each seed, and the mean")
    cost.set_ylabel("validation accuracy, %")
    parameters = [f"{form}\n{content['parameters'][form]:,} parameters" for form in FORMS]
    cost.set_xticks(range(len(FORMS)), parameters)
    cost.margins(x=0.25, y=0.1)
    return figures.save(figure, folder, NAME)
