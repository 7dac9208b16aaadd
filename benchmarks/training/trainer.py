"""The training loop: epochs, an evaluation after each, in one process or many, from the start or a checkpoint."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from console.progress import Progress
from rich.console import Console
from torch import Tensor, nn

from training import checkpoints
from training.checkpoints import CheckpointError
from training.images import DataError, Images
from training.processes import Interrupt, Processes

AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
WARM_UP_STEPS = 5
STEPS_BETWEEN_DISPLAYS = 10
INTERRUPTED = 130

# What a checkpoint must agree on with the run that resumes it; all else may change in between.
SETTINGS = (
    "model", "depth", "image_size", "epochs", "warmup_epochs", "batch_size", "lr", "momentum", "weight_decay",
    "label_smoothing", "amp", "dtype", "sync_batchnorm", "seed",
)  # fmt: skip


STATE = {"settings", "epoch", "step", "history", "model", "optimizer", "scheduler", "scaler", "ranks"}


class Stop(SystemExit):
    """Ends the run between two steps, after the same one on every process."""

    code: int


@dataclass
class Epoch:
    """One line of the results: means over the training steps and over the validation images."""

    epoch: int
    training_loss: float
    validation_loss: float
    accuracy: float
    lr: float


@dataclass
class Throughput:
    """Images a second over the training steps, without this process's first ones, evaluations and checkpoints.

    As a context, it runs inside and stands still outside.
    """

    processes: Processes
    images: int = 0
    seconds: float = 0.0
    steps: int = 0
    since: float = 0.0

    def start(self) -> None:
        self.processes.synchronize()
        self.since = perf_counter()

    def stop(self) -> None:
        self.processes.synchronize()
        if self.steps >= WARM_UP_STEPS:
            self.seconds += perf_counter() - self.since

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def count(self, images: int) -> None:
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            self.start()
        elif self.steps > WARM_UP_STEPS:
            self.images += images

    def rate(self) -> float | None:
        return self.images / self.seconds if self.images else None


class Trainer:
    """A network with everything that changes while it is trained. Ranks differ in ``loss`` and random numbers only."""

    def __init__(
        self, network: nn.Module, model: nn.Module, images: Images, args: argparse.Namespace,
        processes: Processes, interrupt: Interrupt,
    ):  # fmt: skip
        """``network`` is evaluated and saved; ``model``, itself or ``processes.parallel(network)``, is trained.

        Raises: DataError where no batch can be filled.
        """
        self.network, self.model, self.images, self.args, self.processes = network, model, images, args, processes
        self.interrupt = interrupt
        self.steps_per_epoch = len(images.shard(processes.rank, processes.size, 0)) // args.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"--batch-size {args.batch_size} with {processes.size} process(es) needs more training images than "
                f"the {len(images.training)} there are"
            )
        self.optimizer = torch.optim.SGD(
            network.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "float16")
        self.epoch = 0
        self.step = 0  # of the epoch
        self.loss = torch.zeros((), dtype=torch.float64, device=processes.device)  # sum over this epoch's steps
        self.history: list[Epoch] = []
        self.throughput = Throughput(processes)
        if processes.size > 1:
            self._order_gradients()

    @property
    def steps(self) -> int:
        """Steps in all, those of resumed runs too."""
        return self.epoch * self.steps_per_epoch + self.step

    def train(self, console: Console) -> int:
        """Until the epochs are done or the run is stopped; the exit code. Writes the last checkpoint."""
        try:
            self._stop_if_asked()
            while self.epoch < self.args.epochs:
                self._train_epoch(console)
                self._end_epoch(console)
        except Stop as stop:
            self._save(console)
            return stop.code
        return 0

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine (Loshchilov and Hutter, "SGDR", 2017, without restarts)."""
        warm_up = round(self.args.warmup_epochs * self.steps_per_epoch)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return (1 + math.cos(math.pi * (step - warm_up) / (self.args.epochs * self.steps_per_epoch - warm_up))) / 2

    def _order_gradients(self) -> None:
        """A backward before the first step, after which DistributedDataParallel orders its buckets anew, once.

        Else it would after the first step of a resumed run, and three processes add up in another order until then.
        """
        image, label = self.images.training[0]
        images, _ = self._moved(image.expand(self.args.batch_size, *image.shape), torch.as_tensor(label))
        self.model.eval()  # changes no statistics, draws no random numbers
        self._outputs(self.model, images).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _train_epoch(self, console: Console) -> None:
        processes, batch_size = self.processes, self.args.batch_size
        batches = self.images.training_batches(processes.rank, processes.size, self.epoch, batch_size, self.step)
        self.model.train()
        what = f"epoch {self.epoch + 1}/{self.args.epochs}"
        with Progress(console, what, self.steps_per_epoch, self.step) as progress, self.throughput:
            for images, labels in batches:
                self._step(images, labels)
                self.throughput.count(batch_size * processes.size)
                # Reading the loss waits for the GPU.
                if self.step % STEPS_BETWEEN_DISPLAYS == 0 and not console.quiet:
                    rate = batch_size * processes.size * progress.rate
                    progress.detail(f"loss {self.loss.item() / self.step:.4f}, {rate:.0f} images/s")
                progress.advance()
                self._stop_if_asked()
                if self.args.checkpoint_every and self.steps % self.args.checkpoint_every == 0:
                    self.throughput.stop()
                    self._save(console)
                    self.throughput.start()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = self._moved(images, labels)
        loss = F.cross_entropy(self._outputs(self.model, images), labels, label_smoothing=self.args.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.loss += loss.detach()
        self.step += 1

    def _outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits, in the dtype that the loss is computed in."""
        autocast = torch.autocast(self.processes.device.type, AMP[self.args.amp], enabled=self.args.amp != "none")
        with autocast:
            return model(images).to(DTYPES[self.args.dtype])

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.args.channels_last else torch.contiguous_format
        images = images.to(self.processes.device, DTYPES[self.args.dtype], non_blocking=True, memory_format=layout)
        return images, labels.to(self.processes.device, non_blocking=True)

    def _stop_if_asked(self) -> None:
        if self.processes.any(self.interrupt.received):
            raise Stop(INTERRUPTED)
        if self.args.max_steps is not None and self.steps >= self.args.max_steps:
            raise Stop(0)

    def _end_epoch(self, console: Console) -> None:
        validation_loss, accuracy = self._evaluate()
        training_loss = self.processes.total(self.loss.clone()).item() / self.processes.size / self.steps_per_epoch
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.append(Epoch(self.epoch + 1, training_loss, validation_loss, accuracy, lr))
        self.epoch += 1
        self.step = 0
        self.loss.zero_()
        rate = self.throughput.rate()
        console.print(
            f"epoch {self.epoch}/{self.args.epochs}: loss {training_loss:.4f}, validation loss {validation_loss:.4f}, "
            f"accuracy {accuracy:.2%}, {'?' if rate is None else f'{rate:.0f}'} images/s",
            soft_wrap=True,
        )
        if self.args.checkpoint:
            self._save(console)

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the validation images, each counted once."""
        processes = self.processes
        # Running statistics that are not synchronised differ by rank; rank 0's are the ones that are saved.
        processes.share_buffers(self.network)
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        batches = iter(self.images.validation_batches(processes.rank, processes.size, self.args.batch_size))
        # As many rounds on every rank, though the last may have nothing for some: they agree on stopping in each.
        for _ in range(self._validation_rounds()):
            batch = next(batches, None)
            if batch is not None:
                images, labels = self._moved(*batch)
                outputs = self._outputs(self.network, images)
                sums[0] += F.cross_entropy(outputs, labels, reduction="sum")
                sums[1] += (outputs.argmax(1) == labels).sum()
                sums[2] += len(labels)
            self._stop_if_asked()
        loss, correct, count = processes.total(sums).tolist()
        return loss / count, correct / count

    def _validation_rounds(self) -> int:
        """Batches of rank 0, which has the most images."""
        return len(self.images.validation_batches(0, self.processes.size, self.args.batch_size))

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on, by the names that the user knows."""
        return {
            **{"--" + name.replace("_", "-"): getattr(self.args, name) for name in SETTINGS},
            "--data (training images)": len(self.images.training),
            "--data (classes)": self.images.classes,
            "the number of processes": self.processes.size,
        }

    def _save(self, console: Console) -> None:
        if self.args.checkpoint is None:
            return
        ranks = self.processes.gather({"random": checkpoints.random_state(), "loss": self.loss.item()})
        if self.processes.rank == 0:
            path = checkpoints.save(self.args.checkpoint, self.steps, {
                "settings": self.settings(),
                "epoch": self.epoch,
                "step": self.step,
                "history": [asdict(epoch) for epoch in self.history],
                "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ranks": ranks,
            })  # fmt: skip
            console.print(f"wrote {path}", soft_wrap=True)
        self.processes.barrier()

    def resume(self, path: Path) -> None:
        """Raises: CheckpointError, with nothing changed, where the file is damaged, or of another kind or run."""
        state = checkpoints.load(path)
        if missing := STATE - (state.keys() if isinstance(state, dict) else set()):
            raise CheckpointError(f"checkpoint {path} is of another format: it lacks {', '.join(sorted(missing))}")
        checkpoints.check_settings(path, state["settings"], self.settings())
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        own = state["ranks"][self.processes.rank]
        self.loss.fill_(own["loss"])
        checkpoints.set_random_state(own["random"])
