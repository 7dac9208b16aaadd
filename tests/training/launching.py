"""train.py as users start it: alone, under torchrun, several at once; what its checkpoints hold."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from training import checkpoints

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "train.py")
ALONE = [sys.executable, SCRIPT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TWO, THREE = ([*TORCHRUN, f"--nproc-per-node={size}", SCRIPT] for size in (2, 3))
SMALL = ["--depth", "8", "--batch-size", "64"]
PATIENCE = 120


def environment(**changes):
    """On the CPU, on its kernels."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**plain, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def start(command, *options, **changes):
    return subprocess.Popen(
        [*command, *map(str, options)], env=environment(**changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_many(size, *options):
    """What torchrun starts, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(ALONE, *options, RANK=str(rank), **common) for rank in range(size)]


def ended(*processes):
    """What each wrote; none may fail or hang."""
    try:
        texts = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(texts)
    return texts


def run(*options, **changes):
    return ended(start(ALONE, *options, **changes))[0]


def run_two(*options):
    return ended(*start_many(2, *options))[0]


def run_three(*options):
    return ended(*start_many(3, *options))[0]


def newest(folder):
    return checkpoints.all_in(folder)[-1]


def same(one, other):
    """Bit for bit the same training state, and the same results on the way."""
    one, other = checkpoints.load(newest(one)), checkpoints.load(newest(other))
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    momenta = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (one, other)]
    assert len(momenta[0]) > 0
    assert all(map(torch.equal, *momenta))
    assert all(one[key] == other[key] for key in ("epoch", "step", "history", "scheduler", "scaler"))
