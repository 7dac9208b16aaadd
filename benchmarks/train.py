"""Trains a residual network: ``python benchmarks/train.py``, or ``torchrun --nproc-per-node=N benchmarks/train.py``.

On the CPU, or on one CUDA GPU for each process. Without arguments, a ResNet-20 on scikit-learn's digits. SIGINT and
SIGTERM end the running step, write a checkpoint, and exit with 130; ``--resume`` goes on from there as if nothing had
happened. On the CPU a process has one thread unless OMP_NUM_THREADS says otherwise, with torchrun or without.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from console.arguments import (
    Parser,
    UsageError,
    count,
    fraction,
    json_file,
    non_negative_float,
    output_folder,
    positive_int,
    write_json,
)
from record.environment import environment
from rich.console import Console
from torch import nn
from training import checkpoints
from training.images import DIGITS, DataError, Images, importing, load_images
from training.processes import Interrupt, Processes, launched
from training.trainer import AMP, DTYPES, INTERRUPTED, Trainer
from workloads.interpreter import speed_up
from workloads.networks import cifar_resnet
from workloads.zoo import torchvision

import resfused

CIFAR_RESNET = "cifar_resnet"
# While they are trained: not the logits alone.
SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


def main(arguments: list[str] | None = None) -> int:
    interrupt = Interrupt()
    args = _arguments(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        with launched() as processes:
            return _run(args, processes, interrupt)
    except UsageError as error:
        _parser().error(str(error))


def _run(args: argparse.Namespace, processes: Processes, interrupt: Interrupt) -> int:
    console = Console(quiet=processes.rank > 0)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if processes.device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic
    newest = _checkpoint_to_resume(args, processes)
    _check_model(args.model)
    images = load_images(args.data, args.image_size, args.workers, args.seed)
    torch.manual_seed(args.seed)
    network, model = _networks(args, images, processes)
    torch.manual_seed(args.seed + processes.rank)
    trainer = Trainer(network, model, images, args, processes, interrupt)
    if newest is not None:
        trainer.resume(newest)
        console.print(f"resuming {newest}", soft_wrap=True)
    elif args.resume:
        console.print(f"no checkpoint in {args.checkpoint}: starting anew", soft_wrap=True)
    code = trainer.train(console)
    if args.json and processes.rank == 0:
        write_json(args.json, _results(args, trainer, code))
    if code == INTERRUPTED:
        console.print(f"interrupted after step {trainer.steps}" + ("" if args.checkpoint else ", nothing was saved"))
    return code


def _checkpoint_to_resume(args: argparse.Namespace, processes: Processes) -> Path | None:
    """The newest that rank 0 finds, for every process."""
    found = processes.gather(checkpoints.all_in(args.checkpoint) if args.checkpoint else [])[0]
    if found and not args.resume:
        raise checkpoints.CheckpointError(
            f"--checkpoint {args.checkpoint} holds {found[-1].name}: --resume continues it, another folder starts anew"
        )
    return found[-1] if found else None


def _networks(args: argparse.Namespace, images: Images, processes: Processes) -> tuple[nn.Module, nn.Module]:
    """The network, and what trains it in every process."""
    network = _plain_network(args.model, args.depth, images).to(processes.device, DTYPES[args.dtype])
    if args.channels_last:
        cast(Any, network).to(memory_format=torch.channels_last)
    model = processes.parallel(network)
    # All in place, and after DistributedDataParallel was made, which refuses SyncBatchNorm on the CPU.
    if args.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if args.fuse:
        report = resfused.fuse_(network)
        if processes.rank == 0:
            print(report)
    if args.compile:
        network.compile()
    return network, model


def _check_model(name: str) -> None:
    """Raises: DataError, which lists the models that there are."""
    if name == CIFAR_RESNET:
        return
    with importing("torchvision", f"--model {name}"):
        models = torchvision().models
    known = [CIFAR_RESNET, *(each for each in models.list_models(module=models) if each not in SEVERAL_OUTPUTS)]
    if name not in known:
        raise DataError(f"--model must be one of {', '.join(known)}, but got {name!r}")


def _plain_network(model: str, depth: int, images: Images) -> nn.Module:
    try:
        if model == CIFAR_RESNET:
            return cifar_resnet(depth, images.classes, images.channels)
        if images.channels != 3:
            raise ValueError(f"takes images of 3 channels, and {DIGITS} have {images.channels}")
        return torchvision().models.get_model(model, num_classes=images.classes)
    except ValueError as error:
        raise DataError(f"--model {model}: {error}") from error


def _results(args: argparse.Namespace, trainer: Trainer, code: int) -> dict[str, Any]:
    return {
        "environment": environment(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "processes": trainer.processes.size,
        "device": trainer.processes.device.type,
        "steps": trainer.steps,
        "interrupted": code == INTERRUPTED,
        "images_per_second": trainer.throughput.rate(),
        "epochs": [asdict(epoch) for epoch in trainer.history],
    }


def _parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", default=DIGITS, help=f"{DIGITS} (default), or a folder with train/CLASS/* and val/CLASS/*"
    )
    images.add_argument("--image-size", type=positive_int, default=224, metavar="N", help="of a folder's images")
    images.add_argument("--workers", type=count, metavar="N", help=f"that load images; default 4, for {DIGITS} 0")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--model", default=CIFAR_RESNET, help=f"{CIFAR_RESNET} (default), or a name in torchvision.models"
    )
    network.add_argument("--depth", type=positive_int, default=20, help=f"of {CIFAR_RESNET}: 6n + 2")
    network.add_argument("--fuse", action=switch, default=True, help="resfused.fuse_(network)")
    network.add_argument("--sync-batchnorm", action="store_true", help="statistics over all processes")
    network.add_argument("--compile", action="store_true", help="torch.compile")
    network.add_argument("--channels-last", action="store_true")
    network.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and images")
    network.add_argument("--amp", choices=AMP, default="none", help="autocast; float16 with a gradient scaler")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=60)
    training.add_argument("--batch-size", type=positive_int, default=64, help="per process; the lr is not scaled by it")
    training.add_argument(
        "--lr", type=non_negative_float, default=0.1, help="its peak: linear warm-up, then a cosine to 0"
    )
    training.add_argument("--warmup-epochs", type=non_negative_float, help="default 1, of a single epoch half of it")
    training.add_argument("--momentum", type=non_negative_float, default=0.9)
    training.add_argument("--weight-decay", type=non_negative_float, default=1e-4)
    training.add_argument("--label-smoothing", type=fraction, default=0.0)
    training.add_argument("--seed", type=count, default=0)
    training.add_argument("--deterministic", action="store_true", help="on a GPU, for runs that repeat bit for bit")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint", type=output_folder, metavar="FOLDER", help="written at every epoch's end, and when stopped"
    )
    run.add_argument("--checkpoint-every", type=positive_int, metavar="STEPS", help="and after so many steps")
    run.add_argument("--resume", action="store_true", help="continue from the newest in the folder, if there is one")
    run.add_argument(
        "--max-steps", type=positive_int, metavar="N", help="stop after so many steps, resumed ones included"
    )
    run.add_argument("--json", type=json_file, metavar="PATH", help="also write the results there")

    return parser


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(1.0, args.epochs / 2)
    if args.checkpoint is None and (args.resume or args.checkpoint_every):
        parser.error("--resume and --checkpoint-every need --checkpoint FOLDER")
    if args.amp != "none" and args.dtype != "float32":
        parser.error(f"--amp {args.amp} needs --dtype float32, but got {args.dtype}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs must be less than --epochs {args.epochs}, but got {args.warmup_epochs}")
    return args


if __name__ == "__main__":
    speed_up()
    sys.exit(main())
