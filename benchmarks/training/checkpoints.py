"""Checkpoints of a training run: a folder of files ``step-NNNNNNNN.pt``, each written whole or not at all."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from console.arguments import UsageError

KEPT = 2


class CheckpointError(UsageError):
    """A checkpoint that cannot be used, and why."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.pt"


def all_in(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes ``state`` and removes all but the newest files: two are kept, in case that one is damaged later."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in all_in(folder)[:-KEPT]:
        old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """The state that was saved, on the CPU.

    Raises: CheckpointError, which names the file, where it is truncated, damaged, or no checkpoint.
    """
    try:
        # torch.load does not compare the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {damaged} in it has a wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read, it is truncated or damaged: {error}") from error


def check_settings(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises: CheckpointError, which names every setting that differs from the one the checkpoint was made with."""
    differing = [
        f"{name} was {saved.get(name)}, but got {given.get(name)}"
        for name in {**saved, **given}
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise CheckpointError(f"checkpoint {path} is of another run: " + "; ".join(differing))


def random_state() -> dict[str, Any]:
    """Where this process's generators are: Python's, numpy's, torch's on the CPU and on the current GPU."""
    name, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *rest),  # type: ignore[union-attr]
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
