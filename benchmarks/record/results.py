"""Result files: JSON to which every call of the command adds a run, and CSV files of the medians beside it."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any, ClassVar, TypeVar

from console.arguments import UsageError, output_file, output_folder

from record.environment import environment

FORMAT = 1
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Sampled:
    """Something that was timed: milliseconds of every repetition."""

    samples_ms: list[float] = field(hash=False)

    @property
    def milliseconds(self) -> float:
        return median(self.samples_ms)

    def quantile(self, percent: int) -> float:
        if len(self.samples_ms) == 1:
            return self.samples_ms[0]
        return quantiles(self.samples_ms, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class OfANode(Sampled):
    """``copy_gb_s``: of a copy in the same run; ``least_bytes``: see ``passes``."""

    form: str
    channels: int
    height: int
    width: int
    batch: int
    dtype: str
    layout: str
    phase: str
    least_bytes: float
    copy_gb_s: float

    @property
    def gb_s(self) -> float:
        """Of the least bytes, whatever was moved."""
        return self.least_bytes / self.milliseconds / 1e6

    @property
    def of_copy(self) -> float:
        return self.gb_s / self.copy_gb_s

    @property
    def passes(self) -> float:
        """Its time in passes of the copy, each of which moves an activation's bytes at the copy's bandwidth."""
        return self.milliseconds * self.copy_gb_s * 1e6 / (self.elements * ITEM_BYTES[self.dtype])

    @property
    def shape(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def elements(self) -> int:
        """Of one activation."""
        return self.batch * self.channels * self.height * self.width


@dataclass(frozen=True)
class NodeTime(OfANode):
    """One phase of one node computed by one variant; ``dtype`` and ``layout`` are those of ours beside it.

    ``error``: the largest of its results, normwise against float64. ``kept_mapped``: whether freed memory of a CPU was.
    """

    variant: str
    cuda_graph: bool
    error: float
    kept_mapped: bool = False

    KIND: ClassVar[str] = "nodes"


@dataclass(frozen=True)
class KernelTime(OfANode):
    """One kernel of ours in a node. ``dram_bytes``: that the GPU's counters saw, None where they were not read."""

    kernel: str
    dram_bytes: float | None

    KIND: ClassVar[str] = "kernels"


@dataclass(frozen=True)
class NetworkTime(Sampled):
    """One step of a whole network. ``dtype``: autocast's where it is a half precision.

    ``error``: of logits and gradients, normwise against ``exact``'s precision.
    """

    network: str
    mode: str
    batch: int
    image_size: int
    variant: str
    peak_bytes: int | None
    error: float
    dtype: str = "bfloat16"

    KIND: ClassVar[str] = "networks"

    @property
    def workload(self) -> tuple[str, str, int, str]:
        return self.network, self.mode, self.batch, self.dtype

    @property
    def images_s(self) -> float:
        return self.batch / self.milliseconds * 1e3


@dataclass(frozen=True)
class StepProfile:
    """Where the time of one training step goes: milliseconds by kind of kernel, and without any kernel."""

    network: str
    batch: int
    variant: str
    span_ms: float
    idle_ms: float
    kinds_ms: dict[str, float] = field(hash=False)
    longest: list[tuple[str, int, float]] = field(hash=False)
    """The kernels that take the most: name, launches, milliseconds."""

    KIND: ClassVar[str] = "steps"


@dataclass(frozen=True)
class StepMemory(Sampled):
    """What a training step allocates, and its time. ``live_bytes``: at the end of the forward; ``error``: as above."""

    network: str
    batch: int
    image_size: int
    dtype: str
    variant: str
    live_bytes: int
    peak_bytes: int
    error: float

    KIND: ClassVar[str] = "memories"

    @property
    def workload(self) -> tuple[str, int, int, str]:
        return self.network, self.batch, self.image_size, self.dtype


@dataclass(frozen=True)
class BuildTime(Sampled):
    """From nothing to the compiled library of the kernels for CPUs."""

    KIND: ClassVar[str] = "builds"


Measurement = NodeTime | KernelTime | NetworkTime | StepProfile | StepMemory | BuildTime
_KINDS: dict[str, type[Measurement]] = {
    t.KIND: t for t in (NodeTime, KernelTime, NetworkTime, StepProfile, StepMemory, BuildTime)
}
# What says which measurement it is; of two alike the later one counts.
_MEASURED = {
    "samples_ms", "least_bytes", "copy_gb_s", "error", "dram_bytes", "peak_bytes", "live_bytes",
    "span_ms", "idle_ms", "kinds_ms", "longest",
}  # fmt: skip
# Of an environment, by what is made of it.
_NEEDED = ("time", "gpu", "driver", "processor", "threads", "torch", "triton", "commit")
M = TypeVar("M", bound=Measurement)


class ResultError(UsageError):
    """A result file that cannot be used, and why."""


class Run:
    """One call of the command, written into its file after every measurement, so that one that is cut off counts too.

    Raises: UsageError, before anything is changed, where the file cannot be written, is no result file or is of
    another machine.
    """

    def __init__(self, path: Path, settings: dict[str, Any], device: str = "cuda"):
        self.path = output_file(path)
        # It is replaced by one that is written beside it.
        output_folder(path.parent)
        self._before = _runs(path) if path.exists() else []
        self._content: dict[str, Any] = {
            "environment": environment(device),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
            **{kind: [] for kind in _KINDS},
            "left_out": [],
        }
        for run in self._before:
            if machine(run["environment"]) != machine(self._content["environment"]):
                raise ResultError(
                    f"{path} has results of {machine(run['environment'])}, and this is "
                    f"{machine(self._content['environment'])}: give another --results"
                )

    def note(self, name: str, value: object) -> None:
        """Something about the run as a whole, such as its correctness gate."""
        self._content[name] = value
        self._save()

    def add(self, measurements: Iterable[Measurement]) -> None:
        for measurement in measurements:
            values = asdict(measurement)
            if isinstance(measurement, Sampled):
                # Events tell half a microsecond at best.
                values["samples_ms"] = [round(sample, 5) for sample in measurement.samples_ms]
            self._content[measurement.KIND].append(values)
        self._save()

    def leave_out(self, what: str, reason: str) -> None:
        self._content["left_out"].append({"what": what, "reason": reason})
        self._save()

    @property
    def environment(self) -> dict[str, Any]:
        return dict(self._content["environment"])

    @property
    def left_out(self) -> list[tuple[str, str]]:
        return [(entry["what"], entry["reason"]) for entry in self._content["left_out"]]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_compact({"format": FORMAT, "runs": [*self._before, self._content]}))
        os.replace(partial, self.path)


@dataclass(frozen=True)
class Results:
    """What was measured on one machine: of each thing the latest measurement.

    ``stem``: what the names of files made of it begin with, in the folder of the first result file.
    """

    machine: str
    environments: list[dict[str, Any]]
    measurements: list[Measurement]
    stem: Path

    @property
    def on_gpu(self) -> bool:
        return bool(self.environments[-1]["gpu"])

    def of(self, kind: type[M]) -> list[M]:
        return [m for m in self.measurements if isinstance(m, kind)]


def load(paths: Sequence[Path]) -> dict[str, Results]:
    """By machine. Raises: ResultError where one of the files is no result file."""
    runs: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, list[Path]] = {}
    for path in paths:
        for run in _runs(path):
            name = machine(run["environment"])
            runs.setdefault(name, []).append(run)
            files.setdefault(name, []).append(path)
    stems = _stems(files)
    return {name: _results(name, of_machine, stems[name]) for name, of_machine in runs.items()}


def _results(name: str, runs: list[dict[str, Any]], stem: Path) -> Results:
    runs = sorted(runs, key=lambda run: run["environment"]["time"])
    latest = {_key(m): m for run in runs for m in _measurements(run)}
    return Results(name, [run["environment"] for run in runs], list(latest.values()), stem)


def _stems(files: dict[str, list[Path]]) -> dict[str, Path]:
    """By machine, from the names of its files: no two alike, wherever they lie."""
    names = {name: "+".join(dict.fromkeys(path.stem for path in paths)) for name, paths in files.items()}
    taken = list(names.values())
    return {
        name: paths[0].with_name(names[name] if taken.count(names[name]) == 1 else f"{names[name]}-{slug(name)}")
        for name, paths in files.items()
    }


def machine(made: dict[str, Any]) -> str:
    """The name of an environment's GPU, or of its processor with its use: with another it is another machine."""
    return made["gpu"] or f"{made['processor']} with {made['instruction_set']}, {made['threads']} threads"


def slug(name: str) -> str:
    """A machine's name in file names: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(device: str) -> Path:
    return Path("results") / f"{slug(machine(environment(device)))}.json"


def write_csv(results: Results, stem: Path) -> list[Path]:
    """A row a measurement: ``<stem>-nodes.csv`` and so on, of the kinds that there are."""
    paths = []
    for kind, measured in _KINDS.items():
        rows = [_row(m) for m in results.of(measured) if isinstance(m, Sampled)]
        if rows:
            paths.append(stem.with_name(f"{stem.name}-{kind}.csv"))
            with paths[-1].open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return paths


def _row(m: Sampled) -> dict[str, Any]:
    row = {f.name: getattr(m, f.name) for f in fields(m) if f.name != "samples_ms"}
    row |= {"p20_ms": m.quantile(20), "median_ms": m.milliseconds, "p80_ms": m.quantile(80)}
    if isinstance(m, OfANode):
        row |= {"gb_s": m.gb_s, "of_copy": m.of_copy, "passes": m.passes}
    if isinstance(m, NetworkTime):
        row |= {"images_s": m.images_s}
    return row


def _key(m: Measurement) -> tuple[object, ...]:
    return type(m), *(getattr(m, f.name) for f in fields(m) if f.name not in _MEASURED)


def _measurements(run: dict[str, Any]) -> Iterator[Measurement]:
    for kind, measured in _KINDS.items():
        for values in run.get(kind, ()):
            yield measured(**values)


def _runs(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultError(f"{path} is no result file of this version: it needs format {FORMAT}")
    try:
        return [_checked(run) for run in content["runs"]]
    except KeyError as error:
        raise ResultError(f"{path} is no whole result file: it lacks {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ResultError(f"{path} is no whole result file: {error}") from error


def _checked(run: dict[str, Any]) -> dict[str, Any]:
    """Raises: one of what Python does where something is missing or of another kind."""
    for name in _NEEDED:
        if name not in run["environment"]:
            raise KeyError(f"environment.{name}")
    for measurement in _measurements(run):
        if isinstance(measurement, Sampled):
            float(measurement.milliseconds)
    return run


def _compact(content: dict[str, Any]) -> str:
    """A measurement a line."""
    return json.dumps(content, separators=(",", ":")).replace('{"samples_ms"', '\n{"samples_ms"') + "\n"
