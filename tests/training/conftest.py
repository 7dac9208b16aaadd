"""What tests of the training loop share."""

from __future__ import annotations

import argparse

import pytest
import torch
from launching import SMALL
from training.images import load_images
from training.processes import Processes
from training.trainer import Trainer
from workloads.networks import cifar_resnet


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
