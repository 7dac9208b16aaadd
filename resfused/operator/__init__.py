"""From a checked call to the kernels: arguments, choice of the implementation, autograd, the dispatcher's operators."""

from .function import FusedResidualBlock
from .synchronised import SynchronisedResidualBlock

__all__ = ["FusedResidualBlock", "SynchronisedResidualBlock"]
