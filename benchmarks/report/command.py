"""Tables, plots and CSV files of result files, and the README's tables, which are made here and never typed."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from console.arguments import output_folder
from console.rows import Rows
from measure import kernel_profile, network_timing, node_timing, variants
from record.results import (
    CPU,
    CPU_LABEL,
    KernelTime,
    NetworkTime,
    NodeTime,
    ResultError,
    Results,
    StepProfile,
    load,
    write_csv,
)
from rich.console import Console
from workloads.passes import BOTH

from report import goals
from report.goals import GOALS, geometric_mean, ratios
from report.plots import write_plots

RECORD = Path(__file__).parent.parent / "results"
BEGIN = "<!-- made by: python benchmarks/run.py report --readme README.md -->"
END = "<!-- end of what report made -->"


def record() -> list[Path]:
    """The result files of GPUs that the repository carries."""
    return sorted(RECORD.glob("nvidia-*.json"))


def show(results: Results, console: Console) -> None:
    """Every table of what was measured."""
    title = CPU_LABEL if results.machine == CPU else results.machine
    times = results.of(NodeTime)
    for key in dict.fromkeys((t.dtype, t.layout, t.cuda_graph) for t in times):
        of_key = [t for t in times if (t.dtype, t.layout, t.cuda_graph) == key]
        dtype, layout, cuda_graph = key
        graphs = ", in CUDA graphs" if cuda_graph else ""
        console.print(node_timing.table(of_key, f"Nodes, {dtype} {layout}{graphs} ({title})"))
    if networks := results.of(NetworkTime):
        console.print(network_timing.table(networks, f"Networks, one step ({title})"))
    if kernels := results.of(KernelTime):
        console.print(kernel_profile.kernel_table(kernels, f"Our streaming kernels ({title})"))
    if steps := results.of(StepProfile):
        console.print(kernel_profile.step_table(steps, f"A training step by kind of kernel, milliseconds ({title})"))
    if results.machine != CPU:
        console.print(_goal_table(results))


def write(results: Results, folder: Path | None = None) -> list[Path]:
    """CSV files and plots, named for the result file and beside it, or in ``folder``."""
    stem = folder / results.stem.name if folder else results.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [*write_csv(results, stem), *write_plots(results, stem)]


def _goal_table(results: Results) -> Rows:
    title = f"Goals on an {goals.GPU}, and what an {results.machine} reached"
    table = Rows(title, keys=("figure", "goal", "reached", "met"))
    for goal in GOALS:
        table.add(*goals.row(goal, results))
    return table


def markdown(by_machine: dict[str, Results], plots: Mapping[str, Sequence[Path]], root: Path) -> str:
    """What the README says of measurements: the goals, and of every GPU its networks and nodes, with the plots."""
    parts = [_goals(by_machine)]
    for machine, results in by_machine.items():
        parts += [_provenance(results), _networks(results), _nodes(results)]
        parts += [f"![{p.stem}]({Path(os.path.relpath(p, root)).as_posix()})" for p in plots[machine]]
    return "\n\n".join(part for part in parts if part)


def put_into(readme: Path, text: str) -> None:
    """Replaces what stands between the markers. Raises: ResultError where they are not there."""
    before, after = around(readme)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def around(readme: Path) -> tuple[str, str]:
    """What stands before and after the markers. Raises: ResultError where they are not there."""
    try:
        before, begin, rest = readme.read_text().partition(BEGIN)
    except (OSError, ValueError) as error:
        raise ResultError(f"--readme {readme} cannot be read: {error}") from error
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultError(f"{readme} has no lines {BEGIN!r} and {END!r} for the tables to stand between")
    return before, after


def _goals(by_machine: dict[str, Results]) -> str:
    """The goals as reached on the GPU they are set for, else on the first there is."""
    results = by_machine.get(goals.GPU, next(iter(by_machine.values()), None))
    reached = f"reached on {results.machine}" if results else "reached"
    return _table(["on an H200", "goal", reached, "met"], (goals.row(goal, results) for goal in GOALS))


def _provenance(results: Results) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(made[name]) for made in results.environments))

    return (
        f"{results.machine}, driver {all_of('driver')}, torch {all_of('torch')}, triton {all_of('triton')}; "
        f"commit {all_of('commit')}."
    )


def _networks(results: Results) -> str:
    times = results.of(NetworkTime)
    eager = {(t.network, t.mode, t.batch): t.milliseconds for t in times if t.variant == network_timing.EAGER}
    rows = [
        (
            f"{t.network} {t.mode}", str(t.batch), t.variant, f"{t.images_s:,.0f}",
            f"{eager[key] / t.milliseconds:.2f}" if (key := (t.network, t.mode, t.batch)) in eager else "",
            f"{t.peak_bytes / 1e9:.1f}" if t.peak_bytes else "",
        )
        for t in times
    ]  # fmt: skip
    return _table(["network", "batch", "variant", "images/s", "x eager", "peak GB"], rows) if rows else ""


def _nodes(results: Results) -> str:
    """Geometric means over the nodes of each setting."""
    times = [t for t in results.of(NodeTime) if t.phase == BOTH]
    rows = []
    for key in dict.fromkeys((t.dtype, t.layout, t.batch, t.cuda_graph) for t in times):
        of_key = [t for t in times if (t.dtype, t.layout, t.batch, t.cuda_graph) == key]
        dtype, layout, batch, cuda_graph = key
        setting = f"{dtype} {layout}" + (", CUDA graphs" if cuda_graph else "")
        for other in dict.fromkeys(t.variant for t in of_key if t.variant != variants.OURS):
            found = ratios(of_key, other).values()
            mean = geometric_mean(found)
            if mean is not None:
                rows.append((setting, str(batch), other, str(len(found)), f"{mean:.2f}", f"{min(found):.2f}"))
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
        around(args.readme)
    for results in by_machine.values():
        output_folder(args.output or results.stem.parent)
    written = {}
    for machine, results in by_machine.items():
        show(results, console)
        written[machine] = write(results, args.output)
    if not by_machine:
        console.print("no GPU has been measured yet: benchmarks/results/ has no result file")
    for path in itertools.chain(*written.values()):
        console.print(f"wrote {path}", soft_wrap=True)
    if args.readme:
        root = args.readme.resolve().parent
        plots = {machine: [p.resolve() for p in paths if p.suffix == ".png"] for machine, paths in written.items()}
        put_into(args.readme, markdown(by_machine, plots, root))
        console.print(f"wrote {args.readme}", soft_wrap=True)
    return 0
