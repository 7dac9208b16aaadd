"""The last phase of a forward once more: y from the activations and the statistics that it was made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.call import Norm
from . import direct, traced


class LastPhase(NamedTuple):
    """What y is made of besides activations; without ``stats`` the running ones of the norms."""

    stats: Tensor | None
    norm: Norm
    residual_norm: Norm | None
    activation: Activation

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y of that forward, bit for bit: one launch, which reads its inputs and writes y."""
        stats, *rest = self
        vectors = (*self.norm[:4], *(self.residual_norm or ())[:4])
        run = direct if direct.is_plain(x, residual, stats, *vectors) else traced
        if stats is None:
            return run.forward(x, residual, *rest, training=False, masked=False)[0]
        return run.normalise(x, residual, stats, *rest, masked=False)[0]


def apart(stats: Tensor | None, norm: Norm, residual_norm: Norm | None, activation: Activation) -> LastPhase:
    """With vectors of its own: an optimizer's step, or FSDP, which frees parameters, comes before a late backward."""
    return LastPhase(stats, _copied(norm), None if residual_norm is None else _copied(residual_norm), activation)


def _copied(norm: Norm) -> Norm:
    return Norm(*(None if t is None else t.detach().clone() for t in norm[:4]), norm.momentum, norm.eps)
