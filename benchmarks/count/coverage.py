"""What ``fuse_`` finds in networks as their libraries write them, and that no number changes; no GPU is needed.

Each network takes one training step and one evaluation in float64, fused and as it was. On a CPU the fused operations
run on plain PyTorch operators, with ``--kernels`` on the kernels in Triton's interpreter; on a GPU always on the
kernels. On plain operators a pair is one tensor twice, so only the kernels show that the gradients of pairs are added.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from console.arguments import write_json
from console.progress import track
from console.rows import Rows
from record.environment import environment
from rich.console import Console
from torch import Tensor, nn
from workloads.gate import relative_error
from workloads.nodes import FORMS
from workloads.zoo import NETWORKS, SMALL, build, entry, logits_of

import resfused
from resfused.backend import Backend

LIMIT = 1e-7
KINDS = ("output", "gradient", "buffer")


@dataclass(frozen=True)
class Coverage:
    """What was fused in one network, and by how much its results differ from those of the unfused one, normwise."""

    network: str
    norms: int
    fused_norms: int
    places: dict[str, int]
    """By form."""
    pairs: int
    left: dict[str, int]
    """The norms left as they are, by reason."""
    errors: dict[str, float]
    """The largest of each kind of result."""

    @property
    def passed(self) -> bool:
        return max(self.errors.values()) <= LIMIT


def cover(name: str, device: torch.device, backend: Backend) -> Coverage:
    """``backend``: what the fused network runs on. Raises: ModuleNotFoundError where the library is not installed."""
    torch.manual_seed(0)
    network = build(name).to(device, torch.float64)
    x = torch.randn(entry(name).shape, dtype=torch.float64, device=device)
    exact = results(copy.deepcopy(network), x)
    report = resfused.fuse_(network)
    with resfused.use_backend(backend):
        ours = results(network, x)
    errors = {result: relative_error(ours[result], exact[result]) for result in exact}
    return Coverage(
        name,
        len(report.norms) + len(report.left),
        len(report.norms),
        dict(Counter(fused.form for fused in report.fused)),
        sum(fused.forked for fused in report.fused),
        dict(Counter(_without_names(left.reason) for left in report.left)),
        {kind: max(error for result, error in errors.items() if result.startswith(kind)) for kind in KINDS},
    )


def results(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step, and the output of the evaluation after it, by kind and name."""
    leaf = x.clone().requires_grad_()
    leaves = {"input": leaf, **dict(network.named_parameters())}
    y = logits_of(network.train()(leaf))
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"output in training": y.detach()}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    found |= {f"buffer {name}": buffer.to(torch.float64, copy=True) for name, buffer in network.named_buffers()}
    with torch.no_grad():
        found["output in evaluation"] = logits_of(network.eval()(x))
    return found


def _without_names(reason: str) -> str:
    """ "layer1.0.se, a SEModule, ..." of every block as one reason."""
    return re.sub(r"\S+\.\S+, (?=an? \w+,)", "", reason)


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 where every difference is within the limit, 1 where one is not, or nothing was compared."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    backend: Backend = "triton" if on_gpu or args.kernels else "torch"
    small = args.short or (args.kernels and not on_gpu)
    console = Console()
    found = []
    for name in track(args.network or list(SMALL if small else NETWORKS), "Fusing", console=console):
        try:
            found.append(cover(name, device, backend))
        except ModuleNotFoundError as error:
            console.print(f"{name} is left out: {error}")
    console.print(_table(found, backend))
    if any(coverage.left for coverage in found):
        console.print(_left_table(found))
    if args.json:
        content = {"environment": environment(), "backend": backend, "networks": [asdict(c) for c in found]}
        write_json(args.json, content)
    return 0 if found and all(coverage.passed for coverage in found) else 1


def _table(found: list[Coverage], backend: str) -> Rows:
    where = "the kernels" if backend == "triton" else "plain operators"
    table = Rows(
        f"Networks with fuse_, on {where}: relative differences to unfused ones in float64",
        keys=("network",),
        values=("norms", "fused", "left", "places", *FORMS, "pairs", *(f"{kind}s" for kind in KINDS), ""),
    )
    for c in found:
        left = sum(c.left.values())
        places = (sum(c.places.values()), *(c.places.get(form, 0) for form in FORMS))
        differences = (f"{c.errors[kind]:.1e}" for kind in KINDS)
        outcome = "[green]ok" if c.passed else "[red]WRONG"
        table.add(c.network, *map(str, (c.norms, c.fused_norms, left, *places, c.pairs)), *differences, outcome)
    return table


def _left_table(found: list[Coverage]) -> Rows:
    table = Rows("Norms left as they are", keys=("network", "because"), values=("norms",))
    for c in found:
        for reason, number in c.left.items():
            table.add(c.network, reason, str(number))
    return table
