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

    def apart(self) -> LastPhase:
        """With vectors of its own: before a late backward an optimizer changes parameters, or FSDP frees them."""
        stats, norm, residual_norm, activation = self
        second = None if residual_norm is None else self._copied(residual_norm)
        return LastPhase(stats, self._copied(norm), second, activation)

    def _copied(self, norm: Norm) -> Norm:
        vectors = norm[:4] if self.stats is None else (*norm[:2], None, None)
        return Norm(*(None if t is None else t.detach().clone() for t in vectors), norm.momentum, norm.eps)
