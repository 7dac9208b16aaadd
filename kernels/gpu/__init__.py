"""The Triton kernels."""

from triton import knobs

from ..call import Gradients, Kept, Norm, accumulator
from ..geometry import dense, geometry, unpack_mask
from . import ahead, launch_table
from .backward import backward, input_gradients, local_sums
from .forward import forward, local_statistics, normalise

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether the kernels run on the CPU, in Triton's interpreter. Read once, when they are defined."""

__all__ = [
    "INTERPRETED",
    "Gradients",
    "Kept",
    "Norm",
    "accumulator",
    "ahead",
    "backward",
    "dense",
    "forward",
    "geometry",
    "input_gradients",
    "launch_table",
    "local_statistics",
    "local_sums",
    "normalise",
    "unpack_mask",
]
