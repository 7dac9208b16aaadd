"""Times of whole networks: a training step or an inference, images a second and peak memory, ours against the others.

Synthetic images that lie on the device; autocast, or float32 throughout; SGD with momentum. Every variant is a model of
its own with the same weights, compared before it is timed: logits and gradients with those of plain float32 (float64 on
a CPU), within twice eager's own difference. The steps of the variants take turns.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from console.progress import Progress
from console.rows import Rows
from record.results import NetworkTime
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from workloads.checkpointed import checkpointed
from workloads.gate import FACTOR, relative_error
from workloads.problems import DTYPES, LAYOUTS
from workloads.zoo import build, entry, logits_of

import resfused
from measure.measuring import Measuring
from measure.timing import Deadline, captured, first_line, interleaved, warm_ups

TRAINING, INFERENCE = MODES = ("training", "inference")
RESNET50, SMALL_NETWORK = "torchvision/resnet50", "small/cifar_resnet8"
RESNET18, RESNET101 = "torchvision/resnet18", "torchvision/resnet101"
IMAGE_SIZE = 224
HALF, FLOAT = "bfloat16", "float32"
# The limit, by bytes of an element, where twice eager's difference to the exact numbers is smaller.
LEAST_ERROR = {2: 1e-2, 4: 1e-3, 8: 1e-9}


@dataclass(frozen=True)
class Way:
    """How a network is run. ``compiled``: torch.compile's mode; ``recompute``: that of ``fuse_``.

    ``dtype``: autocast's, or a wider one of everything; None is the workload's.
    """

    fused: bool = False
    compiled: str | None = None
    cuda_graph: bool = False
    layout: str = "channels_last"
    dtype: torch.dtype | None = None
    recompute: bool = False
    checkpointed: bool = False

    def model(self, network: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A copy of ``network`` as this way has it, with parameters of ``dtype``.

        Raises: RuntimeError where nothing in it can be fused.
        """
        model = cast(Any, copy.deepcopy(network)).to(dtype, memory_format=LAYOUTS[self.layout])
        if self.fused and not resfused.fuse_(model, recompute=self.recompute).fused:
            raise RuntimeError("fuse_ finds nothing in it")
        if self.checkpointed:
            model = checkpointed(model)
        return cast(nn.Module, torch.compile(model, mode=self.compiled, dynamic=False)) if self.compiled else model


OURS, AGAIN, EAGER = "resfused", "resfused again", "eager"
OURS_GRAPH, OURS_COMPILED = "resfused, CUDA graph", "resfused, torch.compile"
COMPILED, AUTOTUNED = "torch.compile", "torch.compile max-autotune"
AGAIN_IN_THE_BACKWARD, CHECKPOINT = "resfused, recomputation", "eager, checkpoint"
WAYS = {
    OURS: Way(fused=True),
    AGAIN: Way(fused=True),
    OURS_GRAPH: Way(fused=True, cuda_graph=True),
    OURS_COMPILED: Way(fused=True, compiled="default"),
    EAGER: Way(),
    "eager, CUDA graph": Way(cuda_graph=True),
    "eager contiguous": Way(layout="contiguous"),
    "eager float16": Way(dtype=torch.float16),
    COMPILED: Way(compiled="default"),
    AUTOTUNED: Way(compiled="max-autotune"),
    AGAIN_IN_THE_BACKWARD: Way(fused=True, recompute=True),
    CHECKPOINT: Way(checkpointed=True),
}


@dataclass(frozen=True)
class Scope:
    """What is timed on a device where nothing else is asked. ``workloads``: (network, mode)."""

    workloads: tuple[tuple[str, str], ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    repetitions: int
    ways: tuple[str, ...]


SCOPES = {
    "cuda": Scope(
        ((RESNET50, TRAINING), (RESNET18, TRAINING), (RESNET101, TRAINING), (RESNET50, INFERENCE)),
        (256, 64), (HALF,), 20, (OURS, AGAIN, OURS_GRAPH, OURS_COMPILED, EAGER, COMPILED),
    ),
    "cpu": Scope(
        ((RESNET50, TRAINING), (RESNET18, TRAINING), (RESNET50, INFERENCE)),
        (16,), (FLOAT, HALF), 5, (OURS, AGAIN, OURS_COMPILED, EAGER, COMPILED),
    ),
}  # fmt: skip


def scope(m: Measuring) -> Scope:
    found = SCOPES[m.device.type]
    if not m.small:
        return found
    ways = found.ways if m.device.type == "cuda" else (OURS, AGAIN, EAGER)
    return Scope(((SMALL_NETWORK, TRAINING),), (entry(SMALL_NETWORK).shape[0],), found.dtypes, 2, ways)


@dataclass(frozen=True)
class Workload:
    network: str
    mode: str
    batch: int
    image_size: int
    dtype: str = HALF

    def __str__(self) -> str:
        return f"{self.network} {self.mode}, batch {self.batch}, {self.dtype}"


class Step:
    """One network run in one way: ``run()`` is a step on the same images every time."""

    def __init__(self, workload: Workload, way: Way, network: nn.Module, images: Tensor, labels: Tensor):
        self._training = workload.mode == TRAINING
        self._way, self._labels = way, labels
        self.dtype = way.dtype or DTYPES[workload.dtype]
        parameters = torch.promote_types(self.dtype, torch.float32)
        self._images = images.to(parameters).contiguous(memory_format=LAYOUTS[way.layout])
        self._model = way.model(network, parameters).train(self._training)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 0.01, momentum=0.9)
        scales = self._training and self.dtype is torch.float16
        self._scaler = torch.amp.GradScaler(images.device.type, enabled=scales)

    def results(self) -> list[Tensor]:
        """Logits, and in training all gradients in one vector; in float64. Nothing but running statistics changes."""
        # A detector draws those regions that it is trained on.
        torch.manual_seed(0)
        logits, loss = self.forward()
        if not self._training:
            return [logits.double()]
        gradients = torch.autograd.grad(loss, [p for p in self._model.parameters() if p.requires_grad])
        return [logits.detach().double(), torch.cat([g.flatten().double() for g in gradients])]

    def run(self) -> None:
        _, loss = self.forward()
        if self._training:
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Compiles the kernels of a fused model side by side."""
        if self._way.fused and not self._way.compiled:
            with self._autocast():
                resfused.warm_up(self._model, self._images)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(logits, loss), the latter in training; a detector's losses are its logits."""
        with torch.set_grad_enabled(self._training), self._autocast():
            logits = logits_of(self._model(self._images))
            if not self._training:
                return logits, logits
            return logits, F.cross_entropy(logits, self._labels) if logits.dim() > 1 else logits.sum()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._images.device.type,
            self.dtype,
            enabled=self.dtype.itemsize == 2,
            # A CUDA graph may not hold the cast weights of an earlier step.
            cache_enabled=not self._way.cuda_graph,
        )


class Judge:
    """A workload's images and weights, and how far off its results may be: twice as far as eager's."""

    def __init__(self, workload: Workload, device: torch.device):
        torch.manual_seed(0)
        self.workload = workload
        self._network = build(workload.network).to(device)
        for module in self._network.modules():
            # torch.compile draws other numbers than eager.
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        size = workload.image_size
        self._images = torch.randn(workload.batch, 3, size, size, device=device)
        with torch.no_grad():
            classes = logits_of(self._network.eval()(self._images[:1])).shape[-1]
        self._labels = torch.randint(classes, (workload.batch,), device=device)
        exact = self.step(Way(dtype=torch.float32 if device.type == "cuda" else torch.float64))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self._exact = exact.results()
        self._limits: dict[torch.dtype, list[float]] = {}

    def step(self, way: Way) -> Step:
        return Step(self.workload, way, self._network, self._images, self._labels)

    def verdict(self, step: Step) -> tuple[float, float]:
        """(error, limit) of the logits or the gradients, whichever come nearer to their limit."""
        dtype = step.dtype
        if dtype not in self._limits:
            eager = self._errors(self.step(Way(dtype=dtype)))
            self._limits[dtype] = [max(FACTOR * error, LEAST_ERROR[dtype.itemsize]) for error in eager]
        errors = zip(self._errors(step), self._limits[dtype], strict=True)
        return max(errors, key=lambda pair: pair[0] / pair[1])

    def _errors(self, step: Step) -> list[float]:
        return [relative_error(ours, exact) for ours, exact in zip(step.results(), self._exact, strict=True)]


@dataclass(frozen=True)
class Ready:
    """A step that was warmed up, the memory that it needs, and the error of its results."""

    call: Callable[[], object]
    peak_bytes: int | None
    error: float


def time_networks(workloads: list[Workload], ways: Sequence[str], repetitions: int, m: Measuring) -> None:
    """Every workload until the deadline; what could not be timed is noted with the reason."""
    if m.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    with Progress(m.console, "Timing networks", len(workloads) * (len(ways) + 1)) as progress:
        for workload in workloads:
            ready = {}
            for way, outcome in _prepared(workload, ways, m.device, m.deadline):
                progress.detail(f"{workload}: {way}")
                progress.advance()
                if isinstance(outcome, Ready):
                    ready[way] = outcome
                else:
                    m.run.leave_out(f"{way}, {workload}", outcome)
            progress.detail(f"{workload}: timing")
            try:
                m.run.add(_timed(workload, ready, repetitions, m.device))
            except Exception as error:
                m.run.leave_out(f"{OURS} and every other way, {workload}", first_line(error))
            progress.advance()
            ready.clear()
            _free(m.device)


def _prepared(
    workload: Workload, ways: Sequence[str], device: torch.device, deadline: Deadline
) -> Iterator[tuple[str, Ready | str]]:
    """Each way with its step, or why there is none: wrong numbers, or whatever it raises."""
    # Dynamo's limit is of compilations of one forward, whatever the network.
    torch._dynamo.reset()
    try:
        judge = Judge(workload, device)
    except Exception as error:
        yield from ((way, f"no exact results: {first_line(error)}") for way in ways)
        return
    for way in ways:
        if deadline.passed:
            yield way, deadline.over
            continue
        try:
            yield way, _prepare(WAYS[way], judge, device)
        except Exception as error:
            yield way, first_line(error)


def _prepare(way: Way, judge: Judge, device: torch.device) -> Ready | str:
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    step = judge.step(way)
    if device.type == "cuda":
        step.warm_up()
    error, limit = judge.verdict(step)
    if not error <= limit:
        return f"WRONG: off by {error:.1e}, over {limit:.1e}"
    if device.type != "cuda":
        return Ready(step.run, None, error)
    for _ in range(warm_ups(device)):
        step.run()
    _free(device)
    torch.cuda.reset_peak_memory_stats()
    if way.cuda_graph:
        # A replay allocates nothing: its memory is what the capture took.
        call = captured([lambda: step.run], device)
    else:
        call = step.run
        call()
    return Ready(call, torch.cuda.max_memory_allocated() - before, error)


def _free(device: torch.device) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(workload: Workload, ready: dict[str, Ready], repetitions: int, device: torch.device) -> list[NetworkTime]:
    samples = interleaved({way: [step.call] for way, step in ready.items()}, repetitions, device)
    return [
        NetworkTime(
            samples[way], workload.network, workload.mode, workload.batch, workload.image_size, way, step.peak_bytes,
            step.error, workload.dtype,
        )
        for way, step in ready.items()
    ]  # fmt: skip


def table(times: list[NetworkTime], title: str) -> Rows:
    """Images a second, peak memory, and how many times as fast as eager."""
    shown = Rows(
        title,
        keys=("network", "mode", "batch", "dtype", "variant"),
        values=("ms", "p20 to p80", "images/s", "x eager", "peak GB"),
        caption="Medians.",
    )
    eager = {t.workload: t.milliseconds for t in times if t.variant == EAGER}
    for t in times:
        base = eager.get(t.workload)
        shown.add(
            t.network, t.mode, str(t.batch), t.dtype, t.variant, f"{t.milliseconds:.2f}",
            f"{t.quantile(20):.2f} to {t.quantile(80):.2f}", f"{t.images_s:.0f}",
            f"{base / t.milliseconds:.2f}" if base else "", f"{t.peak_bytes / 1e9:.2f}" if t.peak_bytes else "",
        )  # fmt: skip
    return shown


def workloads(args: argparse.Namespace, m: Measuring) -> list[Workload]:
    """From the command's arguments, else all that the device's scope has."""
    found = scope(m)
    pairs = found.workloads
    if args.network or args.mode:
        networks = args.network or list(dict.fromkeys(network for network, _ in pairs))
        pairs = tuple(product(networks, args.mode or [TRAINING]))
    return [
        Workload(name, mode, batch, args.image_size or image_size(name), dtype)
        for dtype, (name, mode) in product(args.dtype or found.dtypes, pairs)
        for batch in args.batch or found.batches
    ]


def image_size(name: str) -> int:
    """ImageNet's, but for networks that are made for less."""
    return entry(name).shape[-1] if name.startswith(("small/", "cifar/")) else IMAGE_SIZE


def standard_workload(m: Measuring) -> Workload:
    """A training step of ResNet-50 with the larger batch."""
    found = scope(m)
    (name, mode), batch = found.workloads[0], found.batches[0]
    return Workload(name, mode, batch, image_size(name), found.dtypes[0])


def measure(args: argparse.Namespace, m: Measuring) -> None:
    found = scope(m)
    ours = [w for w in found.ways if WAYS[w].fused]
    ways = (*ours, *args.against) if args.against else found.ways
    time_networks(workloads(args, m), ways, args.repetitions or found.repetitions, m)
