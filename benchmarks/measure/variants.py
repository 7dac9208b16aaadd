"""What a node can be computed by: ours, what a user would otherwise pick, and in which dtype and layout each runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import rivals
import torch
from torch import Tensor
from workloads.problems import LAYOUTS, Problem

from resfused import functional, reference

OURS, AGAIN, EAGER, CONTIGUOUS, FLOAT16 = "resfused", "resfused again", "eager", "eager contiguous", "eager float16"
COMPILED, AUTOTUNED = "torch.compile", "torch.compile max-autotune"


@dataclass(frozen=True)
class Variant:
    """``library``: makes what has the functions of ``resfused.reference``.

    ``dtype`` and ``layout``: of its tensors where they are not those of the comparison. ``departs``: whether they are
    all that it is about.
    """

    library: Callable[[], object]
    dtype: torch.dtype | None = None
    layout: str | None = None
    departs: bool = False

    def applies(self, dtype: torch.dtype, layout: str) -> bool:
        """Whether it is of the same precision, and something else than what is compared already."""
        same_precision = self.dtype is None or dtype.itemsize == self.dtype.itemsize
        return same_precision and not (self.departs and (dtype == self.dtype or layout == self.layout))

    def problem(self, p: Problem) -> Problem:
        """``p``, in the dtype and layout of this variant, with running statistics of its own.

        Eager's backward holds on to them, and refuses what another variant's forward has changed.
        """
        p = replace(p, running=[r.clone() for r in p.running])
        if self.dtype is None and self.layout is None:
            return p
        dtype = self.dtype or p.dy.dtype
        memory_format = LAYOUTS[self.layout] if self.layout else torch.preserve_format

        def converted(t: Tensor) -> Tensor:
            return t.detach().to(dtype, memory_format=memory_format, copy=True).requires_grad_(t.requires_grad)

        return replace(p.copy(), activations=[converted(t) for t in p.activations], dy=converted(p.dy))


def compiled(mode: str | None) -> object:
    """The composites, each compiled as it stands; a ninth shape is an error until ``torch._dynamo.reset()``.

    A backward is timed many times over one graph: no buffer may be donated to it.
    """
    import_module("torch._functorch.config").donated_buffer = False  # type: ignore[attr-defined]

    class Compiled:
        pass

    for name in ("batch_norm_relu", "batch_norm_add_relu", "batch_norm_add_batch_norm_relu"):
        function = torch.compile(getattr(reference, name), dynamic=False, fullgraph=True, mode=mode)
        setattr(Compiled, name, staticmethod(function))
    return Compiled


VARIANTS: dict[str, Variant] = {
    OURS: Variant(lambda: functional),
    AGAIN: Variant(lambda: functional),
    EAGER: Variant(lambda: reference),
    CONTIGUOUS: Variant(lambda: reference, layout="contiguous", departs=True),
    FLOAT16: Variant(lambda: reference, dtype=torch.float16, departs=True),
    COMPILED: Variant(lambda: compiled(None)),
    # Its CUDA graphs apart, which hold the outputs of one call: ``--cuda-graph`` captures every variant alike.
    AUTOTUNED: Variant(lambda: compiled("max-autotune-no-cudagraphs")),
    "cuDNN graph": Variant(rivals.RIVALS["cuDNN graph"]),
    # All that they take.
    "apex groupbn": Variant(rivals.RIVALS["apex groupbn"], dtype=torch.float16),
    "attorch": Variant(rivals.RIVALS["attorch"], layout="contiguous"),
}
STANDARD = (OURS, AGAIN, EAGER, COMPILED)
