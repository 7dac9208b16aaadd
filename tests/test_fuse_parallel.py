"""Fused models in DistributedDataParallel and fully_shard: real processes over gloo; and in DataParallel."""

import time

import parallel_cases
import pytest
import torch
import torch.multiprocessing

SECONDS = 150


@pytest.mark.interpreter
@pytest.mark.parametrize("case", parallel_cases.CASES)
@pytest.mark.parametrize("processes", [1, 2])
def test_processes(case, processes, tmp_path):
    """Every process compares with eager PyTorch; the traceback of one that fails is the message."""
    arguments = (processes, str(tmp_path / "store"), case)
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
