"""``python warming_cases.py FOLDER``: models warmed up under a driver that launches nothing; prints what was found.

A process of its own: it needs compiled kernels, and the tests' has interpreted ones.
"""

import copy
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import triton
from count.stub_driver import launching_nothing
from resfused.kernels.gpu import launch_table
from small_networks import BasicBlock, images, step
from torch import nn
from triton import knobs

import resfused
from resfused import backend

kernels = backend.load_kernels()
# Quickly compiled.
SMALL = launch_table.STREAMING["apply", True][0][1]._replace(elements=64, inner=16, warps=1)


@triton.jit
def _others_kernel(x):
    pass


class Looked(nn.Module):
    """Looks up what activations say, for which they must be indices; launches a kernel that is not the library's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout()
        self.block = BasicBlock(3, 3)
        self.table = nn.Embedding(1, 3)

    def forward(self, x):
        _others_kernel[(1,)](x)
        x = resfused.tail(self.norm, x)
        return self.block(self.dropout(x)), self.table(x.detach().long())


class Watched:
    """What is launched and compiled, where, and whether it was on the disk."""

    def __init__(self, launched):
        self.launched, self.threads, self.compiled = launched, set(), Counter()
        knobs.compilation.listener = self._note

    def _note(self, *, src, cache_hit, **rest):
        self.compiled["library" if "others" not in src.name else "others"] += 1
        self.threads.add(threading.get_ident())

    def of(self, call):
        """(its result, launches, kernels of the library compiled)"""
        before = self.launched.value, self.compiled["library"]
        result = call()
        return result, self.launched.value - before[0], self.compiled["library"] - before[1]


def evaluated(model, x):
    with torch.no_grad():
        model.eval()(x)


def found(watched):
    torch.use_deterministic_algorithms(True)  # What nothing is written to is NaN.
    model, x = Looked(), images(torch.device("cpu"), torch.float32)
    model.norm.eval()
    resfused.fuse_(model.block)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    results = {"warm_up": watched.of(lambda: resfused.warm_up(model, x))}
    results["as it was"] = [
        all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items()),
        torch.equal(torch.get_rng_state(), before[1]),
        all(p.grad.eq(1).all().item() for p in model.parameters()),
        [name for name, module in model.named_children() if not module.training],
    ]
    results["threads"] = len(watched.threads - {threading.get_ident()})
    results["others"] = watched.compiled["others"]
    block = model.block
    results["step"] = watched.of(lambda: step(block, x) and None)
    results["again"] = watched.of(lambda: resfused.warm_up(block, x.clone().requires_grad_()))
    results["evaluation"] = watched.of(lambda: evaluated(block, x))
    block.requires_grad_(False).bfloat16()
    results["another dtype"] = watched.of(lambda: resfused.warm_up(block, x.bfloat16()))
    return results


if __name__ == "__main__":
    with (
        mock.patch.object(kernels, "INTERPRETED", True),
        launching_nothing("sm_90", Path(sys.argv[1])) as launched,
        launch_table.using(STREAMING=dict.fromkeys(launch_table.STREAMING, ((None, SMALL),))),
    ):
        print(json.dumps(found(Watched(launched))))
