"""The two libraries of blocks that each experiment runs with, by name: names travel between processes."""

from __future__ import annotations

import resfused
from resfused import reference

REFERENCE, FUSED = "reference", "fused"
LIBRARIES = {REFERENCE: reference, FUSED: resfused}
