"""Fused BatchNorm + residual addition + ReLU for training residual networks: each activation moved once.

Replace the blocks of a network by those of this package, or their norms by its norms, or call ``resfused.functional``.
"""

from pathlib import Path as _Path

# In a source checkout the kernels lie beside this package, not in it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from . import functional, kernels, reference
from .backend import backend_for, get_backend, set_backend, use_backend
from .blocks import (
    BottleneckResidualBlock,
    LinearResidualBlock,
    ProjectionResidualBlock,
    ResidualBlock,
    Sequential,
)
from .conversion import Check, Fused, Left, Report, fuse_, unfuse_
from .kernels.activation import ACTIVATIONS, Activation
from .norms import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormAddAct1d,
    BatchNormAddAct2d,
    BatchNormAddAct3d,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    SyncBatchNormAct,
    SyncBatchNormAddAct,
    SyncBatchNormAddReLU,
    SyncBatchNormReLU,
    convert_sync_batchnorm,
    tail,
)
from .operator import FusedResidualBlock, SynchronisedResidualBlock
from .version import __version__
from .warming import warm_up

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormAddAct1d",
    "BatchNormAddAct2d",
    "BatchNormAddAct3d",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "BottleneckResidualBlock",
    "Check",
    "Fused",
    "FusedResidualBlock",
    "Left",
    "LinearResidualBlock",
    "ProjectionResidualBlock",
    "Report",
    "ResidualBlock",
    "Sequential",
    "SyncBatchNormAct",
    "SyncBatchNormAddAct",
    "SyncBatchNormAddReLU",
    "SyncBatchNormReLU",
    "SynchronisedResidualBlock",
    "__version__",
    "backend_for",
    "convert_sync_batchnorm",
    "functional",
    "fuse_",
    "get_backend",
    "kernels",
    "reference",
    "set_backend",
    "tail",
    "unfuse_",
    "use_backend",
    "warm_up",
]
