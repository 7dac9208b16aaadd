"""The kernels for CPUs, in C++: the functions of ``kernels.gpu``, with the same arguments and results."""

from ..call import Gradients, Kept, Norm, accumulator
from ..geometry import dense, plane_geometry, unpack_plane_mask
from .build import LIBRARIES, UnavailableError, built, load, obstacle
from .functions import backward, forward, input_gradients, local_statistics, local_sums, normalise

geometry = plane_geometry
unpack_mask = unpack_plane_mask

__all__ = [
    "LIBRARIES",
    "Gradients",
    "Kept",
    "Norm",
    "UnavailableError",
    "accumulator",
    "backward",
    "built",
    "dense",
    "forward",
    "geometry",
    "input_gradients",
    "load",
    "local_statistics",
    "local_sums",
    "normalise",
    "obstacle",
    "unpack_mask",
]
