"""The processes of a training run: which one this is, its device, and how they agree."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from console.arguments import UsageError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Processes:
    """This process is ``rank`` of ``size``, on ``device``. Every method but ``synchronize`` is a collective.

    ``group``: for tensors on the CPU, by gloo; None for one process. Not the default group, which
    DistributedDataParallel keeps alive: its threads may hold a Python tensor when the interpreter ends, and abort.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def parallel(self, module: nn.Module) -> nn.Module:
        """``module`` with its gradients averaged over the processes, and rank 0's parameters and buffers in all."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def total(self, values: Tensor) -> Tensor:
        """``values`` added over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group_of(values))
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag. On the CPU, so that no GPU is waited for."""
        return self.total(torch.tensor(int(flag))).item() > 0

    def barrier(self) -> None:
        self.any(False)

    def gather(self, value: object) -> list[Any]:
        """Every process's value, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Rank 0's buffers for everyone."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0, group=self._group_of(buffer))

    def synchronize(self) -> None:
        """Waits for this process's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.group if tensor.device.type == "cpu" else None


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun launched, on one GPU each where there are GPUs; otherwise this one alone."""
    rank, size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    processes = Processes(rank, max(size, 1), _device(local_rank))
    if size > 1:
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo")
        processes.group = cast(Any, dist.new_group(backend="gloo"))
    yield processes
    # Not after an error: the others may be waiting for this process, and learn from its end that it will not come.
    if size > 1:
        processes.group = None
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UsageError(f"every process needs a GPU of its own, and this machine has {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class Interrupt:
    """From its making on, notes SIGINT and SIGTERM in ``received``; the process goes on until it looks."""

    def __init__(self) -> None:
        self.received = False
        # Every time, not once: at Ctrl-C a worker of torchrun has the signal from the terminal and from torchrun.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
