"""Errors of M2, a channel's sum of squared deviations, in float32: eager's, ours in C++, Triton's.

Normwise, relative to M2 in float64 of the same values, by how far their mean is off zero in standard deviations. Of a
mean that is rounded to float32 there remains mean/std·2^-24 in each deviation, which no algorithm makes good.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from console.arguments import write_json
from console.rows import Rows
from resfused.kernels import cpu
from rich.console import Console
from torch import Tensor
from workloads.gate import relative_error
from workloads.interpreter import interpreted
from workloads.problems import LAYOUTS

from resfused import backend

SHAPE = (32, 16, 28, 28)
RATIOS = (0.3, 1e2, 1e4)
CASES = tuple(product(RATIOS, LAYOUTS))
EAGER, NATIVE, INTERPRETED, EAGER_ON_GPU, ON_GPU = "eager", "C++", "Triton, interpreted", "eager, GPU", "Triton, GPU"

Errors = list[float]
"""One for each of ``CASES``."""


def errors(m2_of: Callable[[Tensor], Tensor], device: str = "cpu") -> Errors:
    """Of what ``m2_of`` makes of activations: a vector over channels."""
    return [_error(m2_of, ratio, layout, device) for ratio, layout in CASES]


def _error(m2_of: Callable[[Tensor], Tensor], ratio: float, layout: str, device: str) -> float:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + ratio
    exact = x.double().var((0, 2, 3), correction=0) * (x.numel() // x.shape[1])
    return relative_error(m2_of(x.to(device, memory_format=LAYOUTS[layout])).cpu(), exact)


def eager(x: Tensor) -> Tensor:
    """From the running variance, which with a momentum of 1 is the batch's."""
    mean, var = x.new_zeros(2, x.shape[1])
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return var.double() * (x.numel() // x.shape[1] - 1)


def native(x: Tensor) -> Tensor:
    return cpu.local_statistics(x, None, False)[1]


def triton(x: Tensor) -> Tensor:
    return backend.load_kernels().local_statistics(x, None, False)[1]


def triton_on_the_cpu() -> Errors:
    """Needs a process with TRITON_INTERPRET."""
    return errors(triton)


def every() -> dict[str, Errors]:
    """Of all that runs on this machine, by name."""
    found = {EAGER: errors(eager)}
    if cpu.obstacle() is None:
        found[NATIVE] = errors(native)
    if backend.load_kernels() is not None:
        found[INTERPRETED] = interpreted(triton_on_the_cpu)
    if torch.cuda.is_available():
        found |= {EAGER_ON_GPU: errors(eager, "cuda"), ON_GPU: errors(triton, "cuda")}
    return found


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0."""
    found = every()
    table = Rows("Errors of M2 in float32", keys=("mean / std", "layout"), values=tuple(found))
    for i, (ratio, layout) in enumerate(CASES):
        table.add(f"{ratio:g}", layout, *(f"{of[i]:.1e}" for of in found.values()))
    Console().print(table)
    if args.json:
        cases = [{"mean/std": ratio, "layout": layout} for ratio, layout in CASES]
        write_json(args.json, [case | {name: of[i] for name, of in found.items()} for i, case in enumerate(cases)])
    return 0
