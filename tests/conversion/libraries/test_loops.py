"""Fused models in loops that others wrote: Lightning's Trainer, Hugging Face's, and one with an Accelerator.

In float64 on the CPU, on the kernels in C++; the unfused model is trained by the same loop.
"""

import copy
import os
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, relative_error
from resfused.kernels import cpu
from small_networks import ResNet, counted, fused_and_eager, images, is_fused
from torch.utils.data import DataLoader
from workloads import zoo

import resfused

CPU = torch.device("cpu")
STEPS, BATCH = 4, 2
PLACES, PAIRS = 11, 3
"""Of ``ResNet``: the stem, two places in each basic block, three in each bottleneck; all blocks but the last are
followed by another."""


@pytest.fixture(autouse=True)
def _environment():
    """What a loop sets for its process is gone with it."""
    with mock.patch.dict(os.environ):
        yield


def batches():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, (STEPS * BATCH,), generator=generator)
    return list(zip(images(CPU, number=STEPS * BATCH), labels, strict=True))


def assert_trains_alike(loop, fused, eager, data, expected):
    """``loop(model, data)`` returns losses; ``expected``: nodes forward, backward, and those of pairs."""
    start = {name: value.clone() for name, value in eager.state_dict().items()}
    with counted(cpu) as ran:
        exact = loop(eager, data)
    assert ran == [0, 0, 0]
    # Last, as its files are looked at.
    with counted(cpu) as ran:
        losses = loop(fused, data)
    assert ran == expected
    assert len(losses) == len(exact) >= STEPS
    assert relative_error(torch.tensor(losses), torch.tensor(exact)) < 1e-9
    assert_close(fused.state_dict(), eager.state_dict(), 1e-9)
    assert not any(torch.equal(value, eager.state_dict()[name]) for name, value in start.items())


def with_lightning(lightning, folder):
    """A loop that accumulates gradients, validates after the last batch, and writes a checkpoint."""

    class Classifier(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def loss(self, batch):
            x, labels = batch
            loss = F.cross_entropy(self.model(x), labels)
            self.losses.append(loss.item())
            return loss

        def training_step(self, batch, index):
            return self.loss(batch)

        def validation_step(self, batch, index):
            self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def loop(model, data):
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, precision="64-true", max_epochs=1, accumulate_grad_batches=2,
            num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        classifier = Classifier(model)
        loader = DataLoader(data, BATCH)
        trainer.fit(classifier, loader, loader)
        trainer.save_checkpoint(folder / "checkpoint.pt")
        return classifier.losses

    return loop


def test_lightning(lightning, tmp_path):
    fused, eager = fused_and_eager(ResNet(), CPU)
    # Training and validation.
    expected = [2 * STEPS * PLACES, STEPS * PLACES, STEPS * PAIRS]
    assert_trains_alike(with_lightning(lightning, tmp_path), fused, eager, batches(), expected)
    assert is_fused(fused)
    written = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state_dict"]
    assert list(written) == [f"model.{name}" for name in ResNet().state_dict()]


def with_transformers(transformers, folder):
    """A loop that writes a checkpoint at its end, and an evaluation."""

    def loop(model, data):
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=0.05, optim="sgd", use_cpu=True, save_steps=STEPS, logging_steps=1, report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluated]

    return loop


def test_transformers(transformers, tmp_path):
    eager = zoo.build("small/transformers_basic").double()
    fused = copy.deepcopy(eager)
    report = resfused.fuse_(fused)
    data = [{"pixel_values": x, "labels": label} for x, label in batches()]
    # The stem, and two places in each of four blocks, of which three are followed by another.
    expected = [2 * STEPS * 9, STEPS * 9, STEPS * 3]
    assert_trains_alike(with_transformers(transformers, tmp_path), fused, eager, data, expected)
    check = report.check(fused, pixel_values=images(CPU))
    assert check.places == (9, 9)
    assert not check.idle
    path = tmp_path / f"checkpoint-{STEPS}"
    written = type(eager).from_pretrained(path)
    assert_close(written.state_dict(), eager.state_dict(), 1e-9)


@pytest.fixture
def accelerator(accelerate):
    """Makes one; processes have one state for all of them."""
    reset = partial(accelerate.state.AcceleratorState._reset_state, reset_partial_state=True)

    def make(**settings):
        reset()
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)

    yield make
    reset()


def with_accelerator(accelerator, model, data):
    """A plain loop; the losses, and all outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, BATCH))
    losses, outputs = [], []
    for x, labels in loader:
        with accelerator.accumulate(prepared):
            outputs.append(prepared(x))
            loss = F.cross_entropy(outputs[-1], labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.stack(outputs).detach()


NODES = [STEPS * PLACES, STEPS * PLACES, STEPS * PAIRS]


def test_accelerate(accelerator):
    fused, eager = fused_and_eager(ResNet(), CPU)
    assert_trains_alike(
        lambda model, data: with_accelerator(accelerator(), model, data)[0], fused, eager, batches(), NODES
    )
    assert is_fused(fused)


def test_accelerate_in_bfloat16(accelerator):
    """The prepared model has accelerate's own forward, under which the fused one is; so have its copies."""
    fused, eager = fused_and_eager(ResNet(), CPU, torch.float32)
    exact = copy.deepcopy(eager).double()
    x = images(CPU, torch.float32)
    outputs = []
    for model in (fused, eager):
        accelerating = accelerator(mixed_precision="bf16")
        data = [(x.float(), label) for x, label in batches()]
        with counted(cpu) as ran:
            outputs.append(with_accelerator(accelerating, model, data)[1])
        assert ran == (NODES if model is fused else [0, 0, 0])
    outputs.append(with_accelerator(accelerator(), exact, batches())[1])
    own, eagers = (relative_error(y, outputs[2]) for y in outputs[:2])
    assert own <= 2 * eagers
    with torch.no_grad():
        copied = copy.deepcopy(fused)
        copied.fc.weight.zero_()
        assert torch.equal(copied(x), copied.fc.bias.bfloat16().float().expand(2, 5))
    accelerating.unwrap_model(fused, keep_fp32_wrapper=False)
    with counted(cpu) as ran:
        unwrapped = fused(x)
    assert ran == [PLACES, 0, 0]
    resfused.unfuse_(fused)
    assert relative_error(unwrapped, fused(x)) < 1e-5
