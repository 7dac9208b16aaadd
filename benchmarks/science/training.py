"""Training of one network on images: stochastic gradient descent, its losses and its training error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training.images import DataError, Images

Order = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """He et al. 2016, section 4.2: momentum and weight decay, the rate divided by 10 at a half and at 3/4 of the steps.

    Before that the rate rises linearly over ``warm_up`` steps. ``steps``: where fewer than those of the epochs.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: int = 20
    steps: int | None = None

    def rate(self, step: int, steps: int) -> float:
        drops = sum(step >= share * steps for share in (1 / 2, 3 / 4))
        return self.lr * min(1.0, (step + 1) / (self.warm_up + 1)) * 0.1**drops


@dataclass(frozen=True)
class Curve:
    """What one training went through.

    ``losses``: cross-entropy of each step's batch. ``wrong``: the fraction of its images that the step found classified
    wrongly: normalised over their batch, before the update. ``seconds``: of all steps together, loading the
    images left out.
    """

    losses: list[float]
    wrong: list[float]
    seconds: float
    steps_per_epoch: int

    @property
    def errors(self) -> list[float]:
        """The training error, the mean of ``wrong`` over each epoch."""
        n = self.steps_per_epoch
        return [sum(self.wrong[i : i + n]) / len(self.wrong[i : i + n]) for i in range(0, len(self.wrong), n)]

    @property
    def milliseconds_per_step(self) -> float:
        return self.seconds / len(self.losses) * 1e3


def as_it_is(indices: Tensor) -> Tensor:
    return indices


def reordered(seed: int) -> Order:
    """Shuffles each batch it is given: the same mathematical gradient, its sums taken in another order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda indices: indices[torch.randperm(len(indices), generator=generator)]


def train(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    order: Order = as_it_is,
) -> Curve:
    """Trains ``network``, which is on ``device`` in ``dtype``, for all epochs of the recipe.

    Raises: DataError where no batch can be filled.
    """
    per_epoch = len(images.training) // recipe.batch_size
    if per_epoch == 0:
        raise DataError(f"a batch of {recipe.batch_size} needs more training images than the {len(images.training)}")
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = min(per_epoch * recipe.epochs, recipe.steps or per_epoch * recipe.epochs)
    losses: list[Tensor] = []
    wrong: list[Tensor] = []
    seconds = 0.0
    network.train()
    for epoch in range(-(-steps // per_epoch)):
        batches = images.training_batches(0, 1, epoch, recipe.batch_size, 0)
        loaded = [_moved(batch, device, dtype, order) for batch in islice(batches, steps - epoch * per_epoch)]
        _wait_for(device)
        start = perf_counter()
        for x, labels in loaded:
            optimizer.param_groups[0]["lr"] = recipe.rate(len(losses), steps)
            logits = network(x)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            wrong.append((logits.detach().argmax(1) != labels).double().mean())
        _wait_for(device)
        seconds += perf_counter() - start
    return Curve(torch.stack(losses).tolist(), torch.stack(wrong).tolist(), seconds, per_epoch)


def accuracy(network: nn.Module, images: Images, device: torch.device, dtype: torch.dtype, batch_size: int) -> float:
    """The fraction of validation images that the network, in evaluation mode, classifies correctly."""
    network.eval()
    right = total = 0
    with torch.no_grad():
        for x, labels in images.validation_batches(0, 1, batch_size):
            right += int((network(x.to(device, dtype)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return right / total


def first_batch(images: Images, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(images, labels) that every network of a seed is measured on.

    Raises: DataError where there are fewer than ``size`` training images.
    """
    for batch in images.training_batches(0, 1, 0, size, 0):
        return _moved(batch, device, dtype, as_it_is)
    raise DataError(f"a batch of {size} needs more training images than the {len(images.training)}")


def _moved(
    batch: tuple[Tensor, Tensor], device: torch.device, dtype: torch.dtype, order: Order
) -> tuple[Tensor, Tensor]:
    x, labels = batch
    indices = order(torch.arange(len(labels)))
    return x[indices].to(device, dtype), labels[indices].to(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
