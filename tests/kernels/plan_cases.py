"""``python plan_cases.py FOLDER``: launch plans under a driver that launches nothing; prints what was found, as JSON.

A process of its own: it needs compiled kernels, and the tests' has interpreted ones.
"""

import gc
import json
import sys
import threading
import weakref
from pathlib import Path
from unittest import mock

import torch
from count.stub_driver import launching_nothing
from resfused.kernels.activation import Activation
from resfused.kernels.call import Kept
from resfused.kernels.gpu import launch_table, plans
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from resfused import backend, functional
from resfused.operator import direct

kernels = backend.load_kernels()
# Quickly compiled.
SMALL = launch_table.STREAMING["apply", True][0][1]._replace(elements=64, inner=16, warps=1)


def activation(shape=(4, 16, 4, 4), dtype=torch.float32, memory_format=torch.channels_last, offset=0):
    """``offset``: elements by which it lies off the allocator's alignment."""
    like = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    storage = torch.randn(like.numel() + offset).to(dtype)
    return storage[offset:].as_strided(like.shape, like.stride(), offset).requires_grad_()


def step(x, momentum=0.1, **dtypes):
    weight = torch.ones(x.shape[1], **dtypes, requires_grad=True)
    running = torch.zeros(x.shape[1], **dtypes), torch.ones(x.shape[1], **dtypes)
    y = functional.batch_norm_add_relu(x, x.detach(), *running, weight, None, True, momentum)
    if torch.is_grad_enabled():
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))


def frozen(x, name, kept=True, dtype=torch.float32):
    """The forward and the backward of a frozen norm, each one launch; without x only those of an identity."""
    norm = kernels.Norm(None, None, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), 0.1, 1e-5)
    given = Kept(x if kept else None, dtype, None, None, None, None, norm, None, Activation(name))
    return (
        lambda: kernels.forward(x, None, norm, None, False, False, given.activation),
        lambda: kernels.backward(torch.ones_like(x), None, given, kernels.Gradients(True, *[False] * 5)),
    )


class Launches:
    """How often Triton looks a kernel up, and what is launched."""

    def __init__(self, launched):
        self.launched, self.looked_up = launched, 0

    def of(self, call):
        """(looked up, launched) by a call."""
        before = self.looked_up, self.launched.value
        call()
        return self.looked_up - before[0], self.launched.value - before[1]

    def run(self, run):
        def counted(function, *args, **kwargs):
            self.looked_up += 1
            return run(function, *args, **kwargs)

        return counted


def found(launches):
    results = {}
    of = launches.of
    variants = {
        "first": activation(),
        "shape": activation((4, 16, 6, 4)),
        "layout": activation(memory_format=torch.contiguous_format),
        "dtype": activation(dtype=torch.bfloat16),
        "alignment": activation(offset=1),
    }
    with torch.no_grad():
        step(variants["first"])
    for name, x in variants.items():
        # Both directions once: what is looked up in either is the same.
        with torch.set_grad_enabled(name == "first"):
            results[name] = of(lambda x=x: step(x)), of(lambda x=x: step(x))
    with torch.no_grad():
        results["vectors' dtype"] = of(lambda: step(variants["dtype"], dtype=torch.bfloat16))
    x = variants["first"].detach()
    for name, given in {
        "nothing": ("silu",), "activation": ("identity",), "x": ("identity", False),
        "x's dtype": ("identity", False, torch.bfloat16),
    }.items():  # fmt: skip
        forward, backward = frozen(x, *given)
        results[f"forward, {name}"], results[f"backward, {name}"] = of(forward), of(backward)
    results["momentum"] = of(lambda: step(variants["first"], momentum=0.7))
    with launch_table.using(STREAMING=launch_table.STREAMING):
        results["launch table"] = of(lambda: step(variants["first"]))
    knobs.runtime.launch_enter_hook.add(hook := lambda metadata: None)
    step(variants["first"])
    results["hook"] = of(lambda: step(variants["first"]))
    knobs.runtime.launch_enter_hook.remove(hook)
    results["arguments"] = arguments()
    results["traced"] = traced(variants["first"])
    results["freed"] = freed()
    results["bounded"] = plans._plan.cache_info().maxsize
    results["threads"] = threads(launches)
    return results


def arguments():
    """The launches of three steps on the same tensors: grids, what each kernel is given, the first looked up."""
    x = activation((8, 16, 2, 2))
    weight, mean, var = (torch.ones(16, requires_grad=i == 0) for i in range(3))
    names = {t.data_ptr(): name for name, t in (("x", x), ("weight", weight), ("mean", mean), ("var", var))}
    launches = []
    call = nvidia.CudaLauncher.__call__

    def recorded(launcher, *args):
        launches[-1].append([*args[:3], *(known(value) for value in args[9:])])
        return call(launcher, *args)

    def known(value):
        """An address by its tensor's name, or as one of what is made in a step."""
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        made = isinstance(value, int) and value > 2**32
        return names.get(value, "made" if made else str(value))

    with mock.patch.object(nvidia.CudaLauncher, "__call__", recorded):
        for _ in range(3):
            launches.append([])
            y = functional.batch_norm_add_relu(x, x.detach(), mean, var, weight, None, True)
            torch.autograd.grad(y, (x, weight), x.detach())
    return launches


def traced(x):
    """Whether a call goes through the dispatcher under a mode, and not without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
        with Names() as names:
            step(x)
        step(x)
    return [sum("resfused" in name for name in names.names), counted.call_count]


def freed():
    """How many of a step's tensors outlive it."""
    x = activation((2, 16, 2, 2))
    made = []
    forward = kernels.forward

    def recorded(*args):
        results = forward(*args)
        made.extend(weakref.ref(t) for t in (*args[:2], *results) if t is not None)
        return results

    with mock.patch.object(kernels, "forward", recorded):
        step(x)
        step(x)
    del x
    gc.collect()
    return sum(reference() is not None for reference in made), len(made)


def threads(launches):
    """Launches of eight threads that begin at once with shapes that none has had."""
    begin = threading.Barrier(8)

    def work(height):
        begin.wait()
        for _ in range(20):
            step(activation((2, 16, height, 2)))

    before = launches.launched.value
    workers = [threading.Thread(target=work, args=(7 + i % 2,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return launches.launched.value - before


if __name__ == "__main__":
    with (
        mock.patch.object(kernels, "INTERPRETED", True),
        launching_nothing("sm_90", Path(sys.argv[1])) as launched,
        launch_table.using(STREAMING=dict.fromkeys(launch_table.STREAMING, ((None, SMALL),))),
    ):
        counter = Launches(launched)
        JITFunction.run = counter.run(JITFunction.run)
        assert direct.is_plain(torch.ones(1))
        print(json.dumps(found(counter)))
