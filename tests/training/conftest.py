"""What tests of the training loop share."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import pytest
import torch
from launching import SMALL
from training.images import load_images
from training.processes import Processes
from training.trainer import Trainer
from workloads.networks import cifar_resnet

CPU = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def here(monkeypatch):
    """The command in this process, whose signal handlers it leaves alone, on the CPU."""
    import train

    monkeypatch.setattr(train, "Interrupt", lambda: argparse.Namespace(received=False))
    monkeypatch.setattr(train, "launched", lambda: nullcontext(CPU))
    return lambda *options: train.main([str(option) for option in options])


@pytest.fixture
def run_here(capsys, here, in_cpp):
    """What the command writes, in a fraction of a new process's time, on the kernels that one would take."""

    def run(*options):
        assert here(*options) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys, here):
    """What the command says to options that it refuses."""

    def refused(*options):
        with pytest.raises(SystemExit) as error:
            here(*options)
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refused


@pytest.fixture
def trainer():
    """Makes a trainer in this process, on the CPU, from options of the command."""
    import train

    def make(*options):
        args = train._arguments([*SMALL, *map(str, options)])
        images = load_images(args.data, args.image_size, args.workers, args.seed)
        network = cifar_resnet(args.depth, images.classes, images.channels)
        return Trainer(network, network, images, args, CPU, argparse.Namespace(received=False))

    return make
