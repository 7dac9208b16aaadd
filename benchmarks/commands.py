"""The commands of run.py: what each is called and takes. Imports nothing heavy, so that help and errors come at once.

A command is a module: ``run(args)`` does it, or ``measure(args, measuring)`` where it adds to a result file. The names
that it chooses from are tables of modules that need torch; they are written out here and tested to be the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from console.arguments import (
    Parser,
    json_file,
    one_of,
    output_file,
    output_folder,
    positive_float,
    positive_int,
)
from workloads.families import FAMILIES
from workloads.nodes import FORMS
from workloads.nodes import NETWORKS as NODES

DEVICES = ("cuda", "cpu")
MEMORIES = ("default", "kept")
DTYPES = ("bfloat16", "float16", "float32", "float64")
LAYOUTS = ("channels_last", "contiguous")
VARIANTS = (
    "eager", "eager contiguous", "eager float16", "torch.compile", "torch.compile max-autotune", "cuDNN graph",
    "apex groupbn", "attorch",
)  # fmt: skip
MODES = ("training", "inference")
FUSED_WAYS = (
    "resfused", "resfused again", "resfused, CUDA graph", "resfused, torch.compile", "resfused, recomputation"
)  # fmt: skip
WAYS = (
    "eager", "eager, CUDA graph", "eager contiguous", "eager float16", "torch.compile", "torch.compile max-autotune",
    "eager, checkpoint",
)  # fmt: skip
NETWORKS = (
    *(f"torchvision/{name}" for name in (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2",
        "regnet_x_400mf", "regnet_y_400mf",
    )),
    *(f"timm/{name}" for name in (
        "resnet18", "resnet50", "resnet50d", "resnet101", "resnext50_32x4d", "seresnet50", "ecaresnet50d",
        "resnetv2_50",
    )),
    "transformers/resnet18", "transformers/resnet50", "cifar/resnet20", "cifar/resnet56",
    *(f"small/{name}" for name in (
        "torchvision_basic", "torchvision_bottleneck", "timm_attention", "transformers_basic", "cifar_resnet8",
    )),
)  # fmt: skip
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
RECORD_STEPS = (
    "suite-gpu", "standard", "nodes-graph", "nodes-float16", "nodes-autotune", "networks", "profile", "memory", "tune",
    "standard-tuned", "suite",
)  # fmt: skip
PARTS = ("tiles", "one-launch", "order")
KERNELS = ("statistics", "normalise", "reduce", "apply", "forward", "backward")
EXPERIMENTS = ("degradation", "gradient_highway", "identity_initialisation", "shortcut_forms")
DIGITS = "DIGITS"


class Command(NamedTuple):
    module: str
    add_arguments: Callable[[Parser], None]
    measures: bool = False
    """Whether it times something, and adds to a result file."""

    @property
    def what(self) -> str:
        """The first line of the module's docstring, which is not imported for it."""
        found = find_spec(self.module)
        assert found is not None
        assert found.origin is not None
        with Path(found.origin).open(encoding="utf-8") as source:
            return source.readline().strip().strip('"')


def parser(description: str) -> Parser:
    """Of run.py; ``command`` of what it reads is a name of ``COMMANDS``, or None."""
    top = Parser(prog="run.py", description=description)
    none = {"results": None, "minutes": None, "small": False, "no_plots": False, "device": None, "threads": None}
    _measuring(top, none)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.what, description=command.what)
        if command.measures:
            # What stands before a command holds in it, too.
            _measuring(sub, dict.fromkeys(none, argparse.SUPPRESS))
        command.add_arguments(sub)
    return top


def _measuring(p: Parser, defaults: dict[str, Any]) -> None:
    p.add_argument(
        "--results", type=output_file, metavar="PATH", default=defaults["results"],
        help="result file to add to; default results/<the GPU's, or the CPU's, name>.json",
    )  # fmt: skip
    p.add_argument(
        "--minutes", type=positive_float, default=defaults["minutes"],
        help="nothing new begins after them; default 7, without a command 4.5; on a CPU 60, or 2.3",
    )  # fmt: skip
    p.add_argument(
        "--small", action="store_true", default=defaults["small"],
        help="small shapes, on a CPU without torch.compile: shows that it works",
    )  # fmt: skip
    p.add_argument(
        "--no-plots", action="store_true", default=defaults["no_plots"],
        help="write the result file alone, without CSV files and plots beside it",
    )  # fmt: skip
    p.add_argument(
        "--device", choices=DEVICES, default=defaults["device"], help="default cuda where there is a CUDA GPU"
    )
    p.add_argument(
        "--threads", type=positive_int, metavar="N", default=defaults["threads"],
        help="PyTorch's, and ours, on a CPU; default its cores",
    )  # fmt: skip


def _node_filters(p: Parser) -> None:
    """Which nodes, and how they are measured."""
    p.add_argument(
        "--network", choices=NODES, action="append", help="whose nodes; repeatable, default both, on a CPU resnet50"
    )
    p.add_argument(
        "--batch", type=positive_int, action="append", metavar="N", help="repeatable; default 256 and 32, on a CPU 32"
    )
    p.add_argument(
        "--dtype", choices=DTYPES, action="append", help="repeatable; default bfloat16, on a CPU float32 too"
    )
    p.add_argument(
        "--layout", choices=LAYOUTS, action="append", help="repeatable; default channels_last, on a CPU both"
    )
    p.add_argument("--form", choices=FORMS, action="append", help="repeatable; default all three")
    p.add_argument(
        "--repetitions", type=positive_int, metavar="N", help="default 30, on a CPU at least 7, of small shapes 5"
    )


def _nodes(p: Parser) -> None:
    _node_filters(p)
    p.add_argument(
        "--against", choices=VARIANTS, action="append", metavar="VARIANT",
        help=f"repeatable: {', '.join(VARIANTS)}; default eager and torch.compile",
    )  # fmt: skip
    p.add_argument("--cuda-graph", action="store_true", help="time replays of CUDA graphs, without launches")
    p.add_argument(
        "--memory", choices=MEMORIES, action="append",
        help="of a CPU: as the C library does by default, or kept mapped when it is freed; default one after the other",
    )  # fmt: skip


def _networks(p: Parser) -> None:
    p.add_argument(
        "--network", action="append", choices=(*NETWORKS, *FAMILIES), metavar="NAME",
        help="repeatable; default torchvision's resnet50, resnet18 and, on a GPU, resnet101",
    )  # fmt: skip
    p.add_argument("--mode", action="append", choices=MODES, help="repeatable; default training; ResNet-50's both")
    p.add_argument(
        "--batch", type=positive_int, action="append", metavar="N", help="repeatable; default 256 and 64, on a CPU 16"
    )
    p.add_argument(
        "--dtype", choices=DTYPES, action="append",
        help="halves are autocast's; repeatable; default bfloat16, on a CPU float32 too",
    )  # fmt: skip
    p.add_argument("--image-size", type=positive_int, metavar="PIXELS", help="default 224, of small networks their own")
    p.add_argument(
        "--against", choices=WAYS, action="append", metavar="WAY",
        help=f"repeatable: {'; '.join(WAYS)}; default eager and torch.compile",
    )  # fmt: skip
    p.add_argument("--repetitions", type=positive_int, metavar="N", help="default 20, on a CPU 5, of small networks 2")


def _memory(p: Parser) -> None:
    p.add_argument(
        "--network", action="append", choices=(*NETWORKS, *FAMILIES), metavar="NAME",
        help="repeatable; default torchvision's resnet50, mobilenet_v2, efficientnet_b0, densenet121 and "
        "fasterrcnn_resnet50_fpn_frozen",
    )  # fmt: skip
    p.add_argument(
        "--way", action="append", choices=(*FUSED_WAYS, *WAYS), metavar="WAY",
        help="repeatable; default eager, with checkpointed blocks, torch.compile, ours, ours with recomputation",
    )  # fmt: skip
    p.add_argument(
        "--batch", type=positive_int, action="append", metavar="N", help="repeatable; default 64, on a CPU 16"
    )
    p.add_argument("--image-size", type=positive_int, metavar="PIXELS", help="default 224, on a CPU 160")
    p.add_argument("--repetitions", type=positive_int, metavar="N", help="of the time; default 20, on a CPU 3")


def _profile(p: Parser) -> None:
    _node_filters(p)
    p.add_argument("--counters", action="store_true", help="also the bytes that memory moved, by ncu")
    p.add_argument(
        "--step", action="append", choices=(*FUSED_WAYS, *WAYS), metavar="WAY",
        help=f"also a training step of ResNet-50 that is run so; repeatable: {'; '.join((*FUSED_WAYS, *WAYS))}",
    )  # fmt: skip


def _record(p: Parser) -> None:
    p.add_argument("--list", action="store_true", help="show the steps and how far they are, and run none")
    p.add_argument(
        "--step", action="append", choices=RECORD_STEPS, metavar="STEP",
        help=f"only this one, also where it was done before; repeatable: {', '.join(RECORD_STEPS)}",
    )  # fmt: skip
    p.add_argument(
        "--out", type=output_folder, default="results/record", metavar="FOLDER",
        help="of results, log and summary; default %(default)s",
    )  # fmt: skip
    p.add_argument("--minutes", type=positive_float, help="no step begins that might not end within them; default none")


def _tune(p: Parser) -> None:
    p.add_argument("--minutes", type=positive_float, default=6.0, help="stop then, with what was found; default 6")
    p.add_argument("--layout", action="append", choices=LAYOUTS, help="repeatable; default one after the other")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--batch", type=positive_int, action="append", metavar="N", help="repeatable; default 256 and 32")
    p.add_argument("--part", action="append", choices=PARTS, help="only this part of the search; repeatable")
    p.add_argument(
        "--kernel", action="append", choices=KERNELS, help="only tiles of this kernel; forward, backward: in one launch"
    )
    p.add_argument("--repetitions", type=positive_int, default=10, metavar="N", help="default %(default)s")
    p.add_argument("--short", action="store_true", help="tiny nodes, one number an entry: shows that it works")
    p.add_argument("--output", type=json_file, metavar="PATH", help="the new table; default: the file the kernels read")
    p.add_argument(
        "--record", type=json_file, metavar="PATH", default="results/tune.json",
        help="every measurement; default %(default)s",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="measure, and write no table")


def _report(p: Parser) -> None:
    p.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="result files; default those in benchmarks/results/"
    )
    p.add_argument(
        "--output", type=output_folder, metavar="FOLDER", help="of CSV files and plots; default each file's own"
    )
    p.add_argument("--readme", type=output_file, metavar="PATH", help="also put the Markdown tables there")


def _science(p: Parser) -> None:
    p.add_argument(
        "experiment", nargs="*", type=one_of(EXPERIMENTS), metavar="EXPERIMENT",
        help=f"of {', '.join(EXPERIMENTS)}; default all",
    )  # fmt: skip
    p.add_argument("--seeds", type=positive_int, metavar="N", help="default: each experiment's own number")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the full size, for a GPU")
    size.add_argument("--short", action="store_true", help="a few steps of tiny networks")
    p.add_argument("--data", default=DIGITS, help=f"{DIGITS} (default), or a folder with train/ and val/ in it")
    p.add_argument("--image-size", type=positive_int, default=32, metavar="N", help="of a folder's images; default 32")
    p.add_argument(
        "--processes", type=positive_int, default=min(2, os.cpu_count() or 1), metavar="N",
        help="trainings at a time on a CPU; default %(default)s",
    )  # fmt: skip
    p.add_argument(
        "--output", type=output_folder, default="results/science", metavar="FOLDER", help="default %(default)s"
    )
    p.add_argument(
        "--write-page", action="store_true", help="the tables of benchmarks/science/README.md, from the results"
    )


def _traffic(p: Parser) -> None:
    p.add_argument("--network", choices=(*NODES, "both"), default="both")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--layout", choices=(*LAYOUTS, "both"), default="both")
    p.add_argument(
        "--bandwidth", type=positive_float, default=4.0, metavar="TB/S", help="what computed times assume; default 4.0"
    )
    _json(p)
    p.add_argument("--short", action="store_true", help="one node of each form, no launches, no totals")


def _audit(p: Parser) -> None:
    p.add_argument("--arch", action="append", choices=ARCHITECTURES, help="an architecture; may be repeated")
    _json(p)
    p.add_argument("--short", action="store_true", help="one architecture, one dtype, one shape")


def _host(p: Parser) -> None:
    p.add_argument("--repetitions", type=positive_int, default=1000, metavar="N", help="default %(default)s")
    _json(p)


def _coverage(p: Parser) -> None:
    names = (*NETWORKS, *FAMILIES)
    p.add_argument("--network", action="append", choices=names, metavar="NAME", help="repeatable; default all")
    p.add_argument("--plain", action="store_true", help="on plain operators, not on the kernels")
    p.add_argument("--short", action="store_true", help="only small networks")
    _json(p)


def _json(p: Parser) -> None:
    p.add_argument("--json", type=json_file, metavar="PATH", help="also write every number there")


STANDARD = Command("measure.standard", lambda p: None, measures=True)
"""The run without a command."""
COMMANDS = {
    "nodes": Command("measure.node_timing", _nodes, measures=True),
    "networks": Command("measure.network_timing", _networks, measures=True),
    "memory": Command("measure.step_memory", _memory, measures=True),
    "profile": Command("measure.kernel_profile", _profile, measures=True),
    "record": Command("record.command", _record),
    "tune": Command("tuning.command", _tune),
    "report": Command("report.command", _report),
    "science": Command("science.command", _science),
    "traffic": Command("count.traffic", _traffic),
    "cpu-traffic": Command("count.cpu_traffic", _json),
    "audit": Command("count.audit", _audit),
    "accuracy": Command("count.accuracy", _json),
    "host": Command("count.host", _host),
    "coverage": Command("count.coverage", _coverage),
}
