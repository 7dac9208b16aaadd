"""The training command as a user runs it: alone and in two processes, stopped and resumed, on plain operators."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from training import checkpoints
from training.images import DIGITS, Augmented, load_images
from training.processes import Processes
from training.trainer import INTERRUPTED, Trainer
from workloads.networks import cifar_resnet

import resfused

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "train.py")
ALONE = [sys.executable, SCRIPT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TWO, THREE = ([*TORCHRUN, f"--nproc-per-node={size}", SCRIPT] for size in (2, 3))
SMALL = ["--depth", "8", "--batch-size", "64"]
PATIENCE = 120


def environment(**changes):
    """On the CPU, on plain operators unless said otherwise."""
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


@pytest.fixture
def refused(capsys, monkeypatch):
    """What the command says to options that it refuses; in this process, whose signal handlers it leaves alone."""
    import train

    monkeypatch.setattr(train, "Interrupt", lambda: argparse.Namespace(received=False))

    def refused(*options):
        with pytest.raises(SystemExit) as error:
            train.main([str(option) for option in options])
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refused


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


@pytest.mark.parametrize(
    ("command", "processes", "precision"),
    [(ALONE, 1, []), (TWO, 2, ["--amp", "bfloat16", "--channels-last"])],
    ids=["alone", "torchrun, bfloat16"],
)
def test_it_trains(command, processes, precision, tmp_path):
    path = tmp_path / "results.json"
    (out,) = ended(start(command, *SMALL, *precision, "--epochs", 6, "--lr", 0.05, "--json", path))
    content = json.loads(path.read_text())
    epochs = content["epochs"]
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["training_loss"] < epochs[0]["training_loss"] / 2
    # Chance is 0.1.
    assert epochs[-1]["accuracy"] > 0.6
    assert out.count("epoch 6/6") == 1
    assert content["environment"]["torch"] == torch.__version__
    assert content["settings"]["lr"] == 0.05
    assert (content["processes"], content["device"], content["interrupted"]) == (processes, "cpu", False)
    assert content["steps"] == 6 * (1437 // (64 * processes))
    assert content["images_per_second"] > 0


def test_stopped_in_an_epoch_and_resumed(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--no-fuse", "--epochs", 2]
    run(*options, "--checkpoint", whole)
    run(*options, "--checkpoint", parts, "--max-steps", 30, "--json", tmp_path / "stopped.json")
    content = json.loads((tmp_path / "stopped.json").read_text())
    assert (content["steps"], len(content["epochs"]), content["interrupted"]) == (30, 1, False)
    assert content["images_per_second"] > 0
    assert newest(parts) == checkpoints.path_of(parts, 30)
    out = run(*options, "--checkpoint", parts, "--resume")
    assert f"resuming {checkpoints.path_of(parts, 30)}" in out.splitlines()
    assert "epoch 1/2" not in out
    same(whole, parts)


def interrupt(processes, to, number, folder):
    """Sends a signal once there is a checkpoint; the exit codes, and the step that the run was left at."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not checkpoints.all_in(folder):
            assert time.monotonic() < deadline, "no checkpoint"
            assert all(p.poll() is None for p in processes), "ended by itself"
            time.sleep(0.01)
        to.send_signal(number)
        codes = [p.wait(PATIENCE) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, int(newest(folder).stem.removeprefix("step-"))


@pytest.mark.parametrize(
    ("command", "number", "repeat"),
    [(ALONE, signal.SIGINT, run), (THREE, signal.SIGTERM, run_three)],
    ids=["alone, SIGINT", "torchrun, SIGTERM"],
)
def test_interrupted_and_resumed(command, number, repeat, tmp_path):
    """A run far too long to end by itself, compared some steps after the signal found it, in a later epoch.

    Two processes add up the same in any order, three do not.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--depth", 8, "--batch-size", 128, "--no-fuse", "--epochs", 10000]
    process = start(command, *options, "--checkpoint", parts, "--checkpoint-every", 1)
    (code,), step = interrupt([process], process, number, parts)
    # torchrun, which passes the signal on, has an exit code of its own.
    assert code == INTERRUPTED if command is ALONE else code != 0
    assert f"interrupted after step {step}\n" in process.stdout.read()
    repeat(*options, "--checkpoint", parts, "--resume", "--max-steps", step + 12)
    repeat(*options, "--checkpoint", whole, "--max-steps", step + 12)
    same(whole, parts)


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, refused):
    options = [*SMALL, "--no-fuse", "--checkpoint", tmp_path]
    processes = start_many(2, *options, "--checkpoint-every", 1, "--epochs", 10000)
    codes, step = interrupt(processes, processes[1], signal.SIGTERM, tmp_path)
    assert codes == [INTERRUPTED, INTERRUPTED]
    assert len(checkpoints.load(checkpoints.path_of(tmp_path, step))["ranks"]) == 2
    assert "the number of processes was 2, but got 1" in refused(*options, "--resume")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("stopped")
    out = run(*SMALL, "--no-fuse", "--checkpoint", folder, "--resume", "--max-steps", 2)
    assert f"no checkpoint in {folder}: starting anew" in out.splitlines()
    return folder


def test_resuming_another_run_is_an_error(stopped, refused):
    changes = ["--lr", "0.2", "--seed", "3", "--max-steps", "4"]
    assert refused(*SMALL, "--no-fuse", "--checkpoint", stopped, "--resume", *changes) == (
        f"train.py: error: checkpoint {newest(stopped)} is of another run: "
        "--lr was 0.1, but got 0.2; --seed was 0, but got 3"
    )


def test_a_folder_with_checkpoints_is_not_written_over(stopped, refused):
    assert "holds step-00000002.pt: --resume continues it" in refused("--no-fuse", "--checkpoint", stopped)


def test_damaged_checkpoints(stopped, tmp_path, refused):
    content = newest(stopped).read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[: len(content) // 2], content[:-1], bytes(flipped), b"", b"no checkpoint"):
        path = checkpoints.path_of(tmp_path, 2)
        path.write_bytes(damaged)
        with pytest.raises(checkpoints.CheckpointError, match=str(path)):
            checkpoints.load(path)
    path.write_bytes(content[: len(content) // 2])
    error = refused(*SMALL, "--no-fuse", "--checkpoint", tmp_path, "--resume")
    assert error.startswith(f"train.py: error: checkpoint {path} cannot be read, it is truncated or damaged")
    checkpoints.save(tmp_path, 2, {"settings": {}, "model": {}})
    error = refused(*SMALL, "--no-fuse", "--checkpoint", tmp_path, "--resume")
    assert error.startswith(f"train.py: error: checkpoint {path} is of another format: it lacks epoch, ")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    for step in range(1, 4):
        checkpoints.save(tmp_path, step, {"step": step})
    assert [p.name for p in checkpoints.all_in(tmp_path)] == ["step-00000002.pt", "step-00000003.pt"]

    def disk_full(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    for step in (3, 4):
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(tmp_path, step, {"step": "new"})
    assert checkpoints.load(newest(tmp_path)) == {"step": 3}


def test_random_state_comes_back_through_a_file(tmp_path):
    def drawn():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    path = checkpoints.save(tmp_path, 0, checkpoints.random_state())
    first = drawn()
    assert drawn() != first
    checkpoints.set_random_state(checkpoints.load(path))
    assert drawn() == first


def test_every_image_is_in_one_shard():
    images = load_images(DIGITS, 224, None, seed=0)
    for size in (1, 2, 7, 11):
        shards = [images.shard(rank, size, epoch=3) for rank in range(size)]
        assert {len(shard) for shard in shards} == {1437 // size}
        assert len({i for shard in shards for i in shard}) == 1437 // size * size
        seen = torch.cat([x.flatten(1) for r in range(size) for x, _ in images.validation_batches(r, size, 8)])
        expected = torch.stack([images.validation[i][0].flatten() for i in range(360)])
        assert len(seen) == 360
        assert sorted(seen.tolist()) == sorted(expected.tolist())
    assert images.shard(0, 2, epoch=3) != images.shard(0, 2, epoch=4)


def test_an_image_is_the_same_in_every_division_of_a_run():
    alone, workers = (load_images(DIGITS, 224, n, seed=5) for n in (0, 2))
    before = torch.get_rng_state()
    whole = list(alone.training_batches(0, 1, 2, 64, taken=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(whole) == 1437 // 64
    for (x, labels), (y, same_labels) in zip(whole[3:], workers.training_batches(0, 1, 2, 64, taken=3), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, same_labels)
    halves = [next(iter(alone.training_batches(rank, 2, 2, 32, taken=0)))[0] for rank in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole[0][0])
    following = list(alone.training_batches(0, 1, 3, 64, taken=0))
    assert not torch.equal(following[0][0], whole[0][0])


def test_augmentation_shifts_by_up_to_one_pixel():
    images = load_images(DIGITS, 224, None, seed=0)
    dot = torch.zeros(1, 8, 8)
    dot[0, 3, 4] = 1
    shifted = [Augmented([(dot, 0)], images.training.transform, seed)[0][0] for seed in range(200)]
    assert {tuple(x.nonzero()[0].tolist()) for x in shifted} == {(0, h, w) for h in (2, 3, 4) for w in (3, 4, 5)}
    training = Augmented([(dot, 0)], images.training.transform, seed=0)
    of_epochs = []
    for training.epoch in range(20):
        of_epochs.append(tuple(training[0][0].nonzero()[0].tolist()))
        assert torch.equal(training[0][0], training[0][0])
    assert len(set(of_epochs)) > 1


@pytest.fixture
def trainer():
    """Makes a trainer in this process, on the CPU, from options of the command."""
    import train

    def make(*options):
        args = train._arguments([*SMALL, *map(str, options)])
        images = load_images(args.data, args.image_size, args.workers, args.seed)
        network = cifar_resnet(args.depth, images.classes, images.channels)
        processes = Processes(0, 1, torch.device("cpu"))
        return Trainer(network, network, images, args, processes, argparse.Namespace(received=False))

    return make


def test_learning_rate_schedule(trainer):
    ours = trainer("--lr", 2, "--epochs", 3, "--warmup-epochs", 1)
    rates = []
    for _ in range(3 * 22):
        rates.append(ours.optimizer.param_groups[0]["lr"])
        ours.optimizer.step()
        ours.scheduler.step()
    assert rates[:22] == pytest.approx([2 * (i + 1) / 23 for i in range(22)])
    assert rates[22] == 2
    assert rates[44] == pytest.approx(1)
    assert sorted(rates[22:], reverse=True) == rates[22:]
    assert ours.optimizer.param_groups[0]["lr"] == 0


def test_a_resumed_run_has_the_random_numbers_of_the_first(trainer, tmp_path):
    options = ["--checkpoint", tmp_path, "--max-steps", 1]
    assert trainer(*options).train(Console(quiet=True)) == 0
    expected = torch.rand(()), np.random.rand(), random.random()
    second = trainer(*options)
    second.resume(newest(tmp_path))
    assert second.steps == 1
    assert (torch.rand(()), np.random.rand(), random.random()) == expected


def test_float16_is_resumed_with_its_gradient_scale(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--no-fuse", "--amp", "float16", "--channels-last", "--label-smoothing", 0.1]
    run(*options, "--checkpoint", whole, "--max-steps", 4)
    for steps in (2, 4):
        run(*options, "--checkpoint", parts, "--resume", "--max-steps", steps)
    same(whole, parts)
    assert checkpoints.load(newest(whole))["scaler"]["_growth_tracker"] == 4


def results(path, *options, **changes):
    out = run(*options, "--json", path, **changes)
    return json.loads(path.read_text())["epochs"], out


def test_fused_and_plain_runs_agree(tmp_path):
    options = [*SMALL, "--epochs", 1, "--warmup-epochs", 0, "--dtype", "float64"]
    plain, _ = results(tmp_path / "plain.json", *options, "--no-fuse")
    fused, out = results(tmp_path / "fused.json", *options)
    with resfused.use_backend("torch"):
        assert str(resfused.fuse_(cifar_resnet(8, 10, 1))) in out
    for name in ("training_loss", "validation_loss", "accuracy"):
        assert [e[name] for e in fused] == pytest.approx([e[name] for e in plain], rel=1e-6)


def test_two_processes_with_synchronised_statistics_are_one_with_the_whole_batch(tmp_path):
    options = ["--depth", 8, "--dtype", "float64", "--sync-batchnorm", "--epochs", 1, "--warmup-epochs", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*options, "--batch-size", 64, "--checkpoint", one)
    run_two(*options, "--batch-size", 32, "--checkpoint", two)
    one, two = checkpoints.load(newest(one)), checkpoints.load(newest(two))
    assert (one["epoch"], two["epoch"]) == (1, 1)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-8, atol=1e-10)
    assert two["history"][0] == pytest.approx(one["history"][0], rel=1e-8)


def test_two_processes_evaluate_what_they_save(tmp_path):
    """Their running statistics differ, and rank 0's are saved; every validation image counts once."""
    out = run_two(*SMALL, "--dtype", "float64", "--epochs", 1, "--checkpoint", tmp_path)
    assert "Warning" not in out
    state = checkpoints.load(newest(tmp_path))
    network = cifar_resnet(8, 10, 1).double().eval()
    network.load_state_dict(state["model"])
    pixels, labels = load_images(DIGITS, 224, None, seed=0).validation.tensors
    with torch.no_grad():
        outputs = network(pixels.double())
    assert state["history"][0]["validation_loss"] == pytest.approx(cross_entropy(outputs, labels).item(), rel=1e-9)
    assert state["history"][0]["accuracy"] == pytest.approx((outputs.argmax(1) == labels).double().mean().item())


@pytest.mark.interpreter
def test_the_kernels_take_the_steps_that_plain_operators_take(tmp_path):
    options = ["--depth", 8, "--batch-size", 4, "--dtype", "float64", "--max-steps", 2, "--checkpoint"]
    run(*options, tmp_path / "plain", "--no-fuse")
    run(*options, tmp_path / "kernels", TRITON_INTERPRET="1")
    plain, fused = (checkpoints.load(newest(tmp_path / name))["model"] for name in ("plain", "kernels"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    assert not torch.equal(fused["3.bn1.running_var"], plain["3.bn1.running_var"])


@pytest.mark.gpu
def test_a_deterministic_gpu_run_is_resumed_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--amp", "bfloat16", "--channels-last", "--deterministic", "--epochs", 2]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    run(*options, "--checkpoint", whole, **visible)
    for extra in (["--max-steps", 30], ["--resume"]):
        run(*options, "--checkpoint", parts, *extra, **visible)
    same(whole, parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume and --checkpoint-every need --checkpoint FOLDER"),
        (["--amp", "bfloat16", "--dtype", "float64"], "--amp bfloat16 needs --dtype float32, but got float64"),
        (["--warmup-epochs", "2", "--epochs", "2"], "--warmup-epochs must be less than --epochs 2, but got 2.0"),
        (["--batch-size", "0"], "argument --batch-size: must be a whole number of at least 1, but got '0'"),
        (["--lr", "nan"], "argument --lr: must be a finite number of at least 0, but got 'nan'"),
        (["--depth", "21", "--no-fuse"], "--model cifar_resnet: depth must be 6n + 2"),
        (["--model", "resnet18"], "--model resnet18: takes images of 3 channels"),
        (
            ["--batch-size", "2000", "--no-fuse"],
            "--batch-size 2000 with 1 process(es) needs more training images than the 1437",
        ),
        (["--data", "nowhere"], "nowhere"),
        (["--model", "nosuch"], "--model must be one of cifar_resnet, alexnet, "),
        (["--model", "nosuch"], " resnet50, "),
        (["--model", "googlenet"], "wide_resnet50_2, but got 'googlenet'"),
        (["--label-smoothing", "2"], "argument --label-smoothing: must be a number from 0 to 1, but got '2'"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, but got '-1'"),
        (["--workers", "two"], "argument --workers: must be a whole number of at least 0, but got 'two'"),
        (["--json", "."], "argument --json: must be a file, but . is a folder"),
        (["--json", SCRIPT], f"argument --json: must be a JSON file or a new one, but {SCRIPT} is of another format"),
        (["--checkpoint", SCRIPT], f"argument --checkpoint: must be a folder, but {SCRIPT} is a file"),
    ],
)
def test_options_that_cannot_be(options, message, refused):
    assert message in refused(*options)


@pytest.fixture
def folder(tmp_path):
    """Red and blue images of uneven sizes, in a folder for each class."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 12), ("val", 5)):
        for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40 + i, 60), colour).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_a_folder_of_images(folder):
    whole, parts, results = folder / "whole", folder / "parts", folder / "results.json"
    options = [
        "--data", folder, "--image-size", 16, "--depth", 8, "--batch-size", 4, "--epochs", 8, "--lr", 0.02,
        "--workers", 1, "--no-fuse",
    ]  # fmt: skip
    run(*options, "--checkpoint", whole, "--json", results)
    assert json.loads(results.read_text())["epochs"][-1]["accuracy"] == 1
    for extra in (["--max-steps", 9], ["--resume"]):
        run(*options, "--checkpoint", parts, *extra)
    same(whole, parts)


def test_a_folder_without_torchvision(refused, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for options in (["--data", str(folder)], ["--model", "resnet18"]):
        expected = f"train.py: error: {' '.join(options)} needs torchvision, which cannot be"
        assert refused(*options).startswith(expected)
