"""Runs of train.py that are stopped, interrupted and resumed; its checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from launching import ALONE, PATIENCE, SMALL, THREE, newest, run, run_three, same, start, start_many
from rich.console import Console
from training import checkpoints
from training.trainer import INTERRUPTED


def test_stopped_in_an_epoch_and_resumed(tmp_path, run_here):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--no-fuse", "--epochs", 2]
    run_here(*options, "--checkpoint", whole)
    run_here(*options, "--checkpoint", parts, "--max-steps", 30, "--json", tmp_path / "stopped.json")
    content = json.loads((tmp_path / "stopped.json").read_text())
    assert (content["steps"], len(content["epochs"]), content["interrupted"]) == (30, 1, False)
    assert content["images_per_second"] > 0
    assert newest(parts) == checkpoints.path_of(parts, 30)
    out = run_here(*options, "--checkpoint", parts, "--resume")
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


@pytest.fixture
def stopped(tmp_path, run_here):
    """The folder of a run that was stopped after two steps."""
    folder = tmp_path / "stopped"
    out = run_here(*SMALL, "--no-fuse", "--checkpoint", folder, "--resume", "--max-steps", 2)
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


def test_a_resumed_run_has_the_random_numbers_of_the_first(trainer, tmp_path):
    options = ["--checkpoint", tmp_path, "--max-steps", 1]
    assert trainer(*options).train(Console(quiet=True)) == 0
    expected = torch.rand(()), np.random.rand(), random.random()
    second = trainer(*options)
    second.resume(newest(tmp_path))
    assert second.steps == 1
    assert (torch.rand(()), np.random.rand(), random.random()) == expected


def test_float16_is_resumed_with_its_gradient_scale(tmp_path, run_here):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--no-fuse", "--amp", "float16", "--channels-last", "--label-smoothing", 0.1]
    run_here(*options, "--checkpoint", whole, "--max-steps", 2)
    for steps in (1, 2):
        run_here(*options, "--checkpoint", parts, "--resume", "--max-steps", steps)
    same(whole, parts)
    assert checkpoints.load(newest(whole))["scaler"]["_growth_tracker"] == 2


@pytest.mark.gpu
def test_a_deterministic_gpu_run_is_resumed_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--amp", "bfloat16", "--channels-last", "--deterministic", "--epochs", 2]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    run(*options, "--checkpoint", whole, **visible)
    for extra in (["--max-steps", 30], ["--resume"]):
        run(*options, "--checkpoint", parts, *extra, **visible)
    same(whole, parts)
