"""Triton kernels of the residual tail. Tensors in, tensors out: no autograd, no modules."""

from triton import knobs

from . import launch_table
from .backward import Gradients, backward
from .forward import Norm, accumulator, forward
from .geometry import dense, geometry, unpack_mask

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether the kernels run on the CPU, in Triton's interpreter. Read once, when they are defined."""

__all__ = [
    "INTERPRETED",
    "Gradients",
    "Norm",
    "accumulator",
    "backward",
    "dense",
    "forward",
    "geometry",
    "launch_table",
    "unpack_mask",
]
