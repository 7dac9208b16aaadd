"""What the four experiments are given: images, seeds, a device, a size; and how their trainings are run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from console.progress import Progress
from rich.console import Console
from torch import Tensor, nn
from training.images import Images, load_images
from workloads.interpreter import speed_up

import resfused

Job = TypeVar("Job")
Result = TypeVar("Result")
Network = TypeVar("Network", bound=nn.Module)

SHORT, DEFAULT, FULL = ("short", "default", "full")
PLAIN_OPERATORS, KERNELS, INTERPRETED = "plain operators", "kernels", "kernels, interpreted"


@dataclass(frozen=True)
class Source:
    """``DIGITS``, or a folder and the size its images are cut to."""

    data: str
    image_size: int

    def load(self, seed: int) -> Images:
        """Training images without augmentation: the training error is that of the same images in every epoch.

        Raises: DataError where the images cannot be had.
        """
        images = load_images(self.data, self.image_size, None, seed)
        images.training.transform = getattr(images.validation, "transform", _as_it_is)
        return images


@dataclass(frozen=True)
class Session:
    """``seeds`` is None where each experiment takes its own number; ``processes``: trainings at a time on a CPU."""

    source: Source
    size: str
    seeds: int | None
    processes: int
    device: torch.device
    console: Console

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kernels(self) -> str:
        """What fused blocks run on where their equality with the reference is shown."""
        return KERNELS if self.on_gpu else INTERPRETED

    def seeds_or(self, number: int) -> list[int]:
        return list(range(self.seeds or number))

    def run(self, work: Callable[[Job], Result], jobs: Sequence[Job], what: str) -> list[Result]:
        """``work`` of every job, in order; on a CPU several processes take them, the first jobs first."""
        with Progress(self.console, what, len(jobs)) as progress:
            if self.on_gpu or min(self.processes, len(jobs)) == 1:
                found = []
                for job in jobs:
                    found.append(work(job))
                    progress.advance()
                return found
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.processes, context, _begin_worker) as pool:
                futures = [pool.submit(work, job) for job in jobs]
                for _ in as_completed(futures):
                    progress.advance()
            return [future.result() for future in futures]


def long_runs_on() -> str:
    """What fused blocks run on in trainings that are too long for Triton's interpreter."""
    return KERNELS if torch.cuda.is_available() else PLAIN_OPERATORS


@contextmanager
def long_run() -> Iterator[torch.device]:
    """The device of such a training, and the backend for its fused blocks."""
    on_gpu = torch.cuda.is_available()
    with resfused.use_backend("triton" if on_gpu else "torch"):
        yield torch.device("cuda" if on_gpu else "cpu")


def placed(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """In channels_last, which takes the fewest programs of the kernels."""
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def one_thread() -> Iterator[None]:
    """Of PyTorch's on the CPU: networks this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _begin_worker() -> None:
    torch.set_num_threads(1)
    speed_up()
