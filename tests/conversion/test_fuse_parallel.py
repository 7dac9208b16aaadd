"""Fused models in DistributedDataParallel and fully_shard: real processes over gloo; and in DataParallel."""

import time
from importlib import import_module
from unittest import mock

import parallel_cases
import pytest
import torch
import torch.multiprocessing
from oracle import assert_close
from small_networks import activations, backward, chain, fused_and_eager, is_fused, kernels, state, step

# A function of this name hides the module.
replicate = import_module("torch.nn.parallel.replicate")

SECONDS = 150


@pytest.mark.interpreter
@pytest.mark.parametrize("processes", [1, 2])
def test_processes(processes, tmp_path):
    """Every case compares with eager PyTorch; the traceback of a process that fails is the message."""
    arguments = (processes, str(tmp_path / "store"))
    children = torch.multiprocessing.start_processes(
        parallel_cases.run, arguments, processes, join=False, start_method="spawn"
    )
    end = time.monotonic() + SECONDS
    try:
        while not children.join(timeout=1):
            assert time.monotonic() < end, f"not done after {SECONDS} seconds"
    finally:
        for process in children.processes:
            process.kill()


def copies(tensors, devices, detach=False):
    return [[tensor.clone() for tensor in tensors] for _ in devices]


def test_replicas_of_data_parallel(device):
    """They are shallow copies, with tensors of their own: each computes with its own, and passes gradients on."""
    results = []
    x = activations(device)
    for model in fused_and_eager(chain(), device):
        with mock.patch.object(replicate, "_broadcast_coalesced_reshape", copies):
            replicas = replicate.replicate(model, [0, 0])
        with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
            ys = [replica(x + i) for i, replica in enumerate(replicas)]
        backward(torch.cat(ys))
        found = {f"replica {i} {name}": b for i, r in enumerate(replicas) for name, b in r.named_buffers()}
        results.append({"output": torch.cat(ys), **state(model), **found})
        assert counted.call_count == (8 if is_fused(model) else 0)
    assert_close(*results, 1e-9)


@pytest.mark.gpu
def test_data_parallel(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    fused, eager = map(torch.nn.DataParallel, fused_and_eager(chain(), device))
    x = activations(device, number=4)
    assert_close(step(fused, x), step(eager, x), 1e-9)
