"""What ``fuse_`` finds in networks as their libraries write them, what of it runs, and that no number changes.

Each network takes one training step and one evaluation in float64, fused and as it was: on the kernels, those in C++ on
a CPU, or with ``--plain`` on PyTorch's operators, where a pair is one tensor twice, and nothing shows that the
gradients of pairs are added. What ran is what called a fused operation in one more call in each mode.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
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
from workloads.zoo import FAMILIES, NETWORKS, SMALL, build, entry, logits_of

import resfused
from resfused.backend import Backend

LIMIT = 1e-7
ZERO = 1e-10
KINDS = ("output", "gradient", "buffer")


@dataclass(frozen=True)
class Coverage:
    """What was fused in one network, and by how much its results differ from those of the unfused one, normwise."""

    network: str
    norms: int
    fused_norms: int
    """That are reported to be fused in training."""
    ran: tuple[int, int]
    """The norms that ran fused, in training and in evaluation."""
    frozen: int
    """Those of them in training whose statistics and parameters are buffers."""
    places: dict[str, int]
    """By form."""
    idle: tuple[int, int]
    """The reported places that did not run, in training and in evaluation."""
    pairs: int
    left: dict[str, int]
    """The norms that are not fused in training, by reason."""
    milliseconds: float
    """Of CPU time that ``fuse_`` took for each norm."""
    errors: dict[str, float]
    """The largest of each kind of result."""

    @property
    def passed(self) -> bool:
        return max(self.errors.values()) <= LIMIT and self.idle == (0, 0)


def cover(name: str, device: torch.device, backend: Backend) -> Coverage:
    """``backend``: what the fused network runs on. Raises: ModuleNotFoundError where the library is not installed."""
    torch.manual_seed(0)
    network = build(name).to(device, torch.float64)
    x = torch.randn(entry(name).shape, dtype=torch.float64, device=device)
    exact = results(copy.deepcopy(network), x)
    # The garbage of the networks before is not this one's.
    gc.collect()
    begin = time.process_time()
    report = resfused.fuse_(network)
    seconds = time.process_time() - begin
    with resfused.use_backend(backend):
        check = report.check(network, x)
        ours = results(network, x)
    errors = differences(ours, exact)
    # A norm alone has nothing to run but the kernels.
    idle = [each.training for each in check.idle if backend != "torch" or each.place.form != "norm"]
    norms = len(report.norms) + len(report.left)
    return Coverage(
        name,
        norms,
        len(report.norms),
        (len(check.norms), len(check.norms_in_evaluation)),
        sum("FrozenBatchNorm" in type(network.get_submodule(norm)).__name__ for norm in check.norms),
        dict(Counter(fused.form for fused in report.fused)),
        (idle.count(True), idle.count(False)),
        sum(fused.forked for fused in report.fused),
        {reason: len(lefts) for reason, lefts in report.reasons().items()},
        seconds * 1e3 / norms,
        {kind: max(error for result, error in errors.items() if result.startswith(kind)) for kind in KINDS},
    )


def differences(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by result. What is zero but for rounding, as the gradient of a bias before another norm, or the mean of
    a convolution of what has none, is compared with the largest of its kind."""
    largest = {kind: max(float(t.norm()) for name, t in exact.items() if name.startswith(kind)) for kind in KINDS}
    found = {}
    for name, tensor in exact.items():
        scale = largest[name.partition(" ")[0]]
        is_zero = not name.startswith("output") and float(tensor.norm()) <= ZERO * scale
        apart = float((ours[name] - tensor).norm()) / scale if is_zero else relative_error(ours[name], tensor)
        found[name] = apart
    return found


def results(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step, and the output of the evaluation after it, by kind and name."""
    # Of dropout and drop path.
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    leaves = {"input": leaf, **{name: p for name, p in network.named_parameters() if p.requires_grad}}
    y = logits_of(network.train()(leaf))
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    found = {"output in training": y.detach()}
    pairs = zip(leaves, gradients, strict=True)
    found |= {f"gradient of {name}": gradient for name, gradient in pairs if gradient is not None}
    found |= {f"buffer {name}": buffer.to(torch.float64, copy=True) for name, buffer in network.named_buffers()}
    with torch.no_grad():
        found["output in evaluation"] = logits_of(network.eval()(x))
    return found


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 where all that was reported ran and every difference is within the limit, else 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend: Backend = "torch" if args.plain else "triton" if device.type == "cuda" else "native"
    console = Console()
    found = []
    names = args.network or list(SMALL if args.short else (*NETWORKS, *FAMILIES))
    for name in track(names, "Fusing", console=console):
        try:
            found.append(cover(name, device, backend))
        except ModuleNotFoundError as error:
            console.print(f"{name} is left out: {error}")
    console.print(_table(found, backend))
    if any(coverage.left for coverage in found):
        console.print(_left_table(found))
    if found:
        console.print(in_all(found))
    if args.json:
        content = {"environment": environment(), "backend": backend, "networks": [asdict(c) for c in found]}
        write_json(args.json, content)
    return 0 if found and all(coverage.passed for coverage in found) else 1


def in_all(found: list[Coverage]) -> str:
    """The sums, in two lines."""
    norms, ran = sum(c.norms for c in found), sum(c.ran[0] for c in found)
    idle = [sum(c.idle[mode] for c in found) for mode in (0, 1)]
    times = [c.milliseconds for c in found]
    error = max(max(c.errors.values()) for c in found)
    return (
        f"{len(found)} networks: {ran:,} of {norms:,} norms ran fused in training ({ran / norms:.0%}); reported places "
        f"that did not run: {idle[0]} in training, {idle[1]} in evaluation\n"
        f"fuse_ takes {statistics.median(times):.1f} ms of CPU time a norm (median), at most {max(times):.1f}; largest "
        f"relative difference {error:.1e}"
    )


def _table(found: list[Coverage], backend: str) -> Rows:
    where = "plain operators" if backend == "torch" else f"the {backend} kernels"
    table = Rows(
        f"Networks with fuse_, on {where}: relative differences to unfused ones in float64",
        keys=("network",),
        values=(
            "norms", "fused", "ran", "ran in eval", "frozen", "left", "places", *FORMS, "pairs", "ms a norm",
            *(f"{kind}s" for kind in KINDS), "",
        ),
    )  # fmt: skip
    for c in found:
        places = (sum(c.places.values()), *(c.places.get(form, 0) for form in FORMS))
        counts = (c.norms, c.fused_norms, *c.ran, c.frozen, sum(c.left.values()), *places, c.pairs)
        differences = (f"{c.errors[kind]:.1e}" for kind in KINDS)
        outcome = "[green]ok" if c.passed else "[red]WRONG"
        table.add(c.network, *map(str, counts), f"{c.milliseconds:.1f}", *differences, outcome)
    return table


def _left_table(found: list[Coverage]) -> Rows:
    table = Rows("Norms left as they are", keys=("network", "because"), values=("norms",))
    for c in found:
        for reason, number in c.left.items():
            table.add(c.network, reason, str(number))
    return table
