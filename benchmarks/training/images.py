"""The images that networks are trained on: scikit-learn's digits, or a folder as torchvision's ImageFolder takes it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from console.arguments import UsageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset
from workloads.zoo import torchvision

DIGITS = "DIGITS"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(UsageError):
    """The images cannot be had, and what would help."""


class Augmented(Dataset[Any]):
    """``dataset`` with ``transform`` on its images, whose random numbers follow from (seed, epoch, index) alone.

    So an image is the same however a run is divided into processes, workers and resumptions.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor], seed: int):
        self.dataset, self.transform, self.seed, self.epoch = dataset, transform, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPU too.
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)))
            return self.transform(image), label


@dataclass(frozen=True)
class Images:
    """A training set, a validation set, and how they are loaded: ``workers`` processes for each loader."""

    training: Augmented
    validation: Dataset[Any]
    channels: int
    classes: int
    workers: int

    def shard(self, rank: int, size: int, epoch: int) -> list[int]:
        """Training indices of process ``rank`` of ``size`` in the order of an epoch; shards are equally long."""
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.training, size, rank, seed=self.training.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    def training_batches(self, rank: int, size: int, epoch: int, batch_size: int, taken: int) -> DataLoader[Any]:
        """The whole batches of an epoch after the first ``taken``, which are not loaded."""
        self.training.epoch = epoch
        rest = self.shard(rank, size, epoch)[taken * batch_size :]
        return self._loader(self.training, batch_size=batch_size, sampler=rest, drop_last=True)

    def validation_batches(self, rank: int, size: int, batch_size: int) -> DataLoader[Any]:
        """Every ``size``-th image from ``rank`` on: each image is in one process's batches, once."""
        indices = range(rank, len(cast(Sized, self.validation)), size)
        return self._loader(Subset(self.validation, indices), batch_size=batch_size)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        # A generator of its own: iterating takes nothing from the run's random numbers.
        return DataLoader(
            dataset, **options, num_workers=self.workers, worker_init_fn=_outlive_signals,
            pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
        )  # fmt: skip


def load_images(source: str, size: int, workers: int | None, seed: int) -> Images:
    """``DIGITS``, or a folder with ``train/CLASS/*`` and ``val/CLASS/*`` whose images are cut to ``size``.

    Raises: DataError where the package that reads them, or the folder, is missing.
    """
    return _digits(workers or 0, seed) if source == DIGITS else _folder(Path(source), size, workers, seed)


@contextmanager
def importing(package: str, what: str) -> Iterator[None]:
    """Makes a failing import a DataError: ``what`` needs ``package``."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{what} needs {package}, which cannot be imported: {error}") from error


def random_shift(image: Tensor) -> Tensor:
    """(C, H, W) moved by up to one pixel up or down and left or right, zeros moving in."""
    _, height, width = image.shape
    top, left = torch.randint(3, (2,)).tolist()
    return F.pad(image, (1, 1, 1, 1))[:, top : top + height, left : left + width]


def _digits(workers: int, seed: int) -> Images:
    with importing("scikit-learn", f"--data {DIGITS}"):
        datasets, model_selection = import_module("sklearn.datasets"), import_module("sklearn.model_selection")
    pixels, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
    images = [torch.from_numpy(part).float().reshape(-1, 1, 8, 8) / 16 for part in parts[:2]]
    training, validation = (
        TensorDataset(part, torch.from_numpy(part_labels)) for part, part_labels in zip(images, parts[2:], strict=True)
    )
    return Images(Augmented(training, random_shift, seed), validation, channels=1, classes=10, workers=workers)


def _folder(folder: Path, size: int, workers: int | None, seed: int) -> Images:
    with importing("torchvision", f"--data {folder}"):
        datasets, transforms = torchvision().datasets, torchvision().transforms
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataError(
                f"--data must be {DIGITS} or a folder with train/ and val/ in it, but {folder} has no {part}/"
            )
    to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *to_tensor])
    middle = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *to_tensor])
    training = datasets.ImageFolder(str(folder / "train"))
    validation = datasets.ImageFolder(str(folder / "val"), middle)
    if training.classes != validation.classes:
        raise DataError(f"{folder}/train and {folder}/val must have the same classes, one folder each")
    return Images(
        Augmented(training, crop, seed), validation, 3, len(training.classes), 4 if workers is None else workers
    )


def _outlive_signals(worker: int) -> None:
    # A signal to the whole process group stops the run, which stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
