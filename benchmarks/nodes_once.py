"""A forward and a backward of each node that the first argument lists as JSON, for hardware counters to watch."""

from __future__ import annotations

import json
import sys

import torch
from workloads.problems import DTYPES, problem

from resfused import functional

for form, dtype, layout, *shape in json.loads(sys.argv[1]):
    batch, channels, height, width = shape
    p = problem(form, (batch, channels, height, width), DTYPES[dtype], layout, torch.device("cuda"))
    p.backward(p.forward(functional))
