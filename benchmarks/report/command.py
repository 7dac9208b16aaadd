"""Tables, plots and CSV files of result files, and the README's tables, which are made here and never typed."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from console.arguments import output_folder
from console.rows import Rows
from measure import kernel_profile, network_timing, node_timing, step_memory, variants
from record.results import (
    KernelTime,
    NetworkTime,
    NodeTime,
    ResultError,
    Results,
    StepMemory,
    StepProfile,
    load,
    write_csv,
)
from rich.console import Console
from workloads.passes import BOTH

from report import cpu_goals, gains, goals
from report.goals import geometric_mean, ratios
from report.plots import write_plots

TINY = f"{node_timing.TINY.channels}x{node_timing.TINY.height}x{node_timing.TINY.width}"
RECORD = Path(__file__).parent.parent / "results"
# The README's parts that are made here: what it opens with, and what it says of speed.
OPENING, SPEED = PARTS = ("the opening", "speed")


def begin(part: str) -> str:
    return f"<!-- {part}, made by: python benchmarks/run.py report --readme README.md -->"


def end(part: str) -> str:
    return f"<!-- end of {part} -->"


def record() -> list[Path]:
    """The result files that the repository carries, the fullest first."""
    found = [path for path in RECORD.glob("*.json") if path.read_bytes().startswith(b'{"format"')]
    return sorted(found, key=lambda path: (-path.stat().st_size, path))


def show(results: Results, console: Console) -> None:
    """Every table of what was measured."""
    title = results.machine
    times = results.of(NodeTime)
    for key in dict.fromkeys(map(_setting, times)):
        of_key = [t for t in times if _setting(t) == key]
        console.print(node_timing.table(of_key, f"Nodes, {node_timing.setting(*key)} ({title})"))
    if networks := results.of(NetworkTime):
        console.print(network_timing.table(networks, f"Networks, one step ({title})"))
    if memories := results.of(StepMemory):
        console.print(step_memory.table(memories, f"Memory of a training step ({title})"))
    if kernels := results.of(KernelTime):
        console.print(kernel_profile.kernel_table(kernels, f"Our streaming kernels ({title})"))
    if steps := results.of(StepProfile):
        console.print(kernel_profile.step_table(steps, f"A training step by kind of kernel, milliseconds ({title})"))
    console.print(_goal_table(results))
    if not results.on_gpu and (headline := gains.headline(results)):
        console.print(f"[bold]{headline}", soft_wrap=True, highlight=False)


def _setting(t: NodeTime) -> tuple[str, str, bool, bool]:
    return t.dtype, t.layout, t.cuda_graph, t.kept_mapped


def write(results: Results, folder: Path | None = None) -> list[Path]:
    """CSV files and plots, named for the result file and beside it, or in ``folder``."""
    stem = folder / results.stem.name if folder else results.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = write_csv(results, stem)
    try:
        return written + write_plots(results, stem)
    except ModuleNotFoundError as error:
        Console().print(f"no plots: {error.name} is not installed")
        return written


def _goal_table(results: Results) -> Rows:
    machine, wanted = (goals.GPU, goals.GOALS) if results.on_gpu else (cpu_goals.MACHINE, cpu_goals.GOALS)
    table = Rows(f"Goals on {machine}, and what {results.machine} reached", keys=("figure", "goal", "reached", "met"))
    for goal in wanted:
        table.add(*goals.row(goal, results))
    return table


def markdown(by_machine: dict[str, Results], plots: Mapping[str, Sequence[Path]], root: Path) -> dict[str, str]:
    """What the README says of measurements, by part: the gains on the first CPU with their picture; then the goals, and
    of every machine its networks and nodes, of a GPU with the plots."""
    opening, speed = [], []
    cpus = {name: results for name, results in by_machine.items() if not results.on_gpu}
    gpus = {name: results for name, results in by_machine.items() if results.on_gpu}
    for machine, results in list(cpus.items())[:1]:
        opening += [_picture(p, root) for p in plots[machine] if p.stem.endswith("-gains")]
        opening.append(gains.headline(results))
    for of_kind, machine, wanted in ((cpus, cpu_goals.MACHINE, cpu_goals.GOALS), (gpus, goals.GPU, goals.GOALS)):
        speed.append(_goals(of_kind, machine, wanted))
        for name, results in of_kind.items():
            speed += [_provenance(results), _networks(results), _nodes(results)]
            speed += [_picture(p, root) for p in plots[name] if results.on_gpu]
    return {
        OPENING: "\n\n".join(filter(None, opening)) or "No CPU has been measured yet.",
        SPEED: "\n\n".join(filter(None, speed)),
    }


def _picture(path: Path, root: Path) -> str:
    return f"![{path.stem}]({Path(os.path.relpath(path, root)).as_posix()})"


def put_into(readme: Path, texts: Mapping[str, str]) -> None:
    """Replaces what stands between the markers of each part. Raises: ResultError where they are not there."""
    text = checked(readme)
    for part, of_it in texts.items():
        before, _, rest = text.partition(begin(part))
        text = f"{before}{begin(part)}\n\n{of_it}\n\n{end(part)}{rest.partition(end(part))[2]}"
    readme.write_text(text)


def checked(readme: Path) -> str:
    """Its text. Raises: ResultError where it has not the markers of every part."""
    try:
        text = readme.read_text()
    except (OSError, ValueError) as error:
        raise ResultError(f"--readme {readme} cannot be read: {error}") from error
    for part in PARTS:
        if end(part) not in text.partition(begin(part))[2]:
            raise ResultError(f"{readme} has no lines {begin(part)} and {end(part)} for the tables to stand between")
    return text


def _goals(by_machine: dict[str, Results], machine: str, wanted: Iterable[goals.Goal]) -> str:
    """The goals as reached on the machine they are set for, else on the first there is; what was not measured there, on
    the first where it was."""
    first = by_machine.get(machine, next(iter(by_machine.values()), None))
    reached = f"reached on {first.machine}" if first else "reached"

    def row(goal: goals.Goal) -> tuple[str, ...]:
        where = next((results for results in (first, *by_machine.values()) if results and goal.measure(results)), first)
        what, bound, figure, met = goals.row(goal, where)
        return what, bound, figure if where is first else f"{figure}, on {where.machine}", met  # type: ignore[union-attr]

    return _table([f"on {machine}", "goal", reached, "met"], map(row, wanted))


def _provenance(results: Results) -> str:
    def all_of(*names: str) -> str:
        found = [f"{name.replace('_', ' ')} {made.get(name)}" for name in names for made in results.environments]
        return ", ".join(dict.fromkeys(found))

    last = results.environments[-1]
    caches = ", ".join(f"{size} of L{kind}" for kind, size in (last.get("caches") or {}).items())
    own = all_of("driver") if results.on_gpu else f"{all_of('cores', 'instruction_set', 'compiler')}; {caches}"
    return f"{results.machine}; {own}; {all_of('torch', 'triton', 'commit')}."


def _networks(results: Results) -> str:
    times = results.of(NetworkTime)
    eager = {t.workload: t.milliseconds for t in times if t.variant == network_timing.EAGER}
    rows = [
        (
            f"{t.network} {t.mode}, {t.dtype}", str(t.batch), t.variant, _images(t),
            f"{eager[t.workload] / t.milliseconds:.2f}" if t.workload in eager else "",
            f"{t.peak_bytes / 1e9:.1f}" if t.peak_bytes else "",
        )
        for t in times
    ]  # fmt: skip
    return _table(["network", "batch", "variant", "images/s", "x eager", "peak GB"], rows) if rows else ""


def _images(t: NetworkTime) -> str:
    return f"{t.images_s:,.0f}" if t.images_s >= 100 else f"{t.images_s:.1f}"


def _nodes(results: Results) -> str:
    """Geometric means over the nodes of each setting."""
    times = [t for t in results.of(NodeTime) if t.phase == BOTH and t.shape != TINY]
    rows = []
    for key in dict.fromkeys((t.batch, _setting(t)) for t in times):
        of_key = [t for t in times if (t.batch, _setting(t)) == key]
        batch, setting = key
        for other in dict.fromkeys(t.variant for t in of_key if t.variant != variants.OURS):
            found = ratios(of_key, other).values()
            mean = geometric_mean(found)
            if mean is not None:
                words = node_timing.setting(*setting)
                rows.append((words, str(batch), other, str(len(found)), f"{mean:.2f}", f"{min(found):.2f}"))
    headers = ["nodes, forward + backward", "batch", "against", "nodes", "geometric mean, times as fast", "least"]
    return _table(headers, rows) if rows else ""


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(args: argparse.Namespace) -> int:
    """Prints the tables, writes the files; 0. Raises: UsageError, with nothing written, where a file cannot be used."""
    console = Console()
    by_machine = load(args.files or record())
    if args.readme:
        checked(args.readme)
    for results in by_machine.values():
        output_folder(args.output or results.stem.parent)
    written = {}
    for machine, results in by_machine.items():
        show(results, console)
        written[machine] = write(results, args.output)
    if not by_machine:
        console.print("nothing has been measured yet: benchmarks/results/ has no result file")
    for path in itertools.chain(*written.values()):
        console.print(f"wrote {path}", soft_wrap=True)
    if args.readme:
        root = args.readme.resolve().parent
        plots = {machine: [p.resolve() for p in paths if p.suffix == ".png"] for machine, paths in written.items()}
        put_into(args.readme, markdown(by_machine, plots, root))
        console.print(f"wrote {args.readme}", soft_wrap=True)
    return 0
