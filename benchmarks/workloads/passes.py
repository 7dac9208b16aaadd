"""The least that a kernel of ours must move: passes over an activation, by kernel and form of node.

One pass reads or writes one activation once, in its own dtype; a bit mask is an eighth of a byte an element. What is
per channel does not count. ``python benchmarks/run.py traffic`` counts the same from the kernels' loads and stores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from workloads.nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU

FORWARD, BACKWARD, BOTH = PHASES = ("forward", "backward", "both")


class Passes(NamedTuple):
    activations: int
    masks: int = 0

    def bytes(self, elements: int, dtype: torch.dtype) -> float:
        return elements * (self.activations * dtype.itemsize + self.masks / 8)


# x (and a normed s); x, s -> y, mask; dy, x (s), mask -> ds where it is dz itself; dy or dz, x (s) -> dx (ds).
SEPARATE_LAUNCHES: dict[str, dict[str, Passes]] = {
    NORM_RELU: {"statistics": Passes(1), "normalise": Passes(2), "reduce": Passes(2), "apply": Passes(3)},
    NORM_ADD_RELU: {"statistics": Passes(1), "normalise": Passes(3, 1), "reduce": Passes(3, 1), "apply": Passes(3)},
    NORM_ADD_NORM_RELU: {"statistics": Passes(2), "normalise": Passes(3), "reduce": Passes(3), "apply": Passes(5)},
}
ONE_LAUNCH: dict[str, dict[str, Passes]] = {
    NORM_RELU: {"forward": Passes(2), "backward": Passes(3)},
    NORM_ADD_RELU: {"forward": Passes(3, 1), "backward": Passes(4, 1)},
    NORM_ADD_NORM_RELU: {"forward": Passes(3), "backward": Passes(5)},
}
KERNELS = {form: SEPARATE_LAUNCHES[form] | ONE_LAUNCH[form] for form in SEPARATE_LAUNCHES}
_LAUNCHES = {FORWARD: ("statistics", "normalise"), BACKWARD: ("reduce", "apply")}


def two_phases(form: str, phase: str) -> Passes:
    """Of a whole node in separate launches, whose second reads again what the first has read."""
    parts = (FORWARD, BACKWARD) if phase == BOTH else (phase,)
    launches = [SEPARATE_LAUNCHES[form][kernel] for part in parts for kernel in _LAUNCHES[part]]
    return Passes(sum(p.activations for p in launches), sum(p.masks for p in launches))
