"""``fuse_``: what a model's code computes, found by tracing, planned, and put in place of its forwards."""

from .checking import Check
from .fuse import fuse_, unfuse_
from .report import Fused, Left, Report

__all__ = ["Check", "Fused", "Left", "Report", "fuse_", "unfuse_"]
