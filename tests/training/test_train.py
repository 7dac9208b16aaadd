"""The training command as a user runs it: alone and in two processes, stopped and resumed, on the CPU's kernels."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from launching import ALONE, SCRIPT, SMALL, TWO, ended, newest, run_two, same, start
from torch.nn.functional import cross_entropy
from training import checkpoints
from training.images import DIGITS, Augmented, load_images
from workloads.networks import cifar_resnet

import resfused


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


def test_fused_and_plain_runs_agree(tmp_path, run_here):
    options = [*SMALL, "--epochs", 1, "--warmup-epochs", 0, "--dtype", "float64", "--json"]
    run_here(*options, tmp_path / "plain.json", "--no-fuse")
    assert str(resfused.fuse_(cifar_resnet(8, 10, 1))) in run_here(*options, tmp_path / "fused.json")
    plain, fused = (json.loads((tmp_path / f"{name}.json").read_text())["epochs"] for name in ("plain", "fused"))
    for name in ("training_loss", "validation_loss", "accuracy"):
        assert [e[name] for e in fused] == pytest.approx([e[name] for e in plain], rel=1e-6)


def test_two_processes_with_synchronised_statistics_are_one_with_the_whole_batch(tmp_path, run_here):
    options = ["--depth", 8, "--dtype", "float64", "--sync-batchnorm", "--epochs", 1, "--warmup-epochs", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    run_here(*options, "--batch-size", 64, "--checkpoint", one)
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


def test_the_kernels_take_the_steps_that_plain_operators_take(tmp_path, run_here):
    options = ["--depth", 8, "--batch-size", 4, "--dtype", "float64", "--max-steps", 2, "--checkpoint"]
    run_here(*options, tmp_path / "plain", "--no-fuse")
    run_here(*options, tmp_path / "kernels")
    plain, fused = (checkpoints.load(newest(tmp_path / name))["model"] for name in ("plain", "kernels"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    assert not torch.equal(fused["3.bn1.running_var"], plain["3.bn1.running_var"])


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
def test_a_folder_of_images(folder, run_here):
    whole, parts, results = folder / "whole", folder / "parts", folder / "results.json"
    options = [
        "--data", folder, "--image-size", 16, "--depth", 8, "--batch-size", 4, "--epochs", 8, "--lr", 0.02,
        "--workers", 1, "--no-fuse",
    ]  # fmt: skip
    run_here(*options, "--checkpoint", whole, "--json", results)
    assert json.loads(results.read_text())["epochs"][-1]["accuracy"] == 1
    for extra in (["--max-steps", 9], ["--resume"]):
        run_here(*options, "--checkpoint", parts, *extra)
    same(whole, parts)


def test_a_folder_without_torchvision(refused, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for options in (["--data", str(folder)], ["--model", "resnet18"]):
        expected = f"train.py: error: {' '.join(options)} needs torchvision, which cannot be"
        assert refused(*options).startswith(expected)
