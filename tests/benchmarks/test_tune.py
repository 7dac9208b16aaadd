"""The search for a launch table: on invented times whose optimum is known, and the command through the interpreter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run as benchmarks
import torch
from count import audit
from measure import timing
from oracle import TOLERANCE, assert_close, problem
from oracle import run as run_node
from resfused.kernels import gpu
from resfused.kernels.gpu import launch_file, launch_table
from resfused.kernels.gpu.launch_file import Entry, Table
from triton.runtime.errors import OutOfResources
from tuning import ahead, directions
from tuning import command as tuning
from tuning.directions import Case, Measured
from tuning.plan import DIRECTIONS, PARTS, cases_of, plan
from tuning.search import AGAIN, PRESENT, Comparison, OutOfTimeError, PresentFailsError, Search, compare_cases
from workloads.nodes import FORMS, Node, resnet50_nodes

import resfused.functional as fused
from resfused import reference

KERNELS = [*launch_file.STREAMING_KERNELS, *launch_file.DIRECTIONS]
LAYOUTS = list(launch_file.LAYOUTS)
CASES = cases_of(resnet50_nodes(), [256, 32], "bfloat16", LAYOUTS)
ENTRY = Entry(1024, 64, 8, 4, 2)
START = Table(
    streaming=dict.fromkeys(launch_table.STREAMING, ((2**22, ENTRY), (2**24, ENTRY), (None, ENTRY))),
    ticketed=dict.fromkeys(launch_table.TICKETED, ENTRY),
    one_launch_elements=launch_table.NO_NODE,
    second_phase_reversed=True,
    second_phase_evicts_first=True,
    channel_major=False,
    tuned_on=None,
)
# What the invented times are least for.
BEST = {"elements": 4096, "warps": 2, "inner": 128, "stages": 3}
ONE_LAUNCH_PAYS = 30_000_000


def invented(case: Case, table: Any) -> float:
    """Milliseconds: more for every doubling that separates an entry from the best one, for 8 programs too many."""
    g = case.geometry
    limit = table.one_launch_elements[case.direction, g.channels_last]
    one_launch = limit is None or g.numel <= limit
    if one_launch:
        entries = [table.ticketed[case.direction, g.channels_last]]
    else:
        classes = [table.streaming[kernel, g.channels_last] for kernel in DIRECTIONS[case.direction]]
        entries = [next(e for limit, e in each if limit is None or g.numel <= limit) for each in classes]
    far = sum(abs(math.log2(getattr(e, name) / best)) for e in entries for name, best in BEST.items())
    far += sum(e.programs / 8 for e in entries)
    if one_launch:
        far += -5 if g.numel <= ONE_LAUNCH_PAYS else 5
    far += table.second_phase_reversed - 0.5 * table.second_phase_evicts_first
    far += table.channel_major * (g.channels_last and not one_launch)
    return g.numel / 1e8 * 1.1**far


def measure_invented(case: Case, variants: dict[str, Any]) -> Measured:
    return Measured({name: invented(case, table) for name, table in variants.items()}, {})


def launch_class(case: Case) -> int:
    return sum(case.geometry.numel > limit for limit in (2**22, 2**24))


def searched(
    measure: Callable[[Case, dict[str, Any]], Measured] = measure_invented,
    seconds: float = math.inf,
    kernels: list[str] = KERNELS,
    parts: tuple[str, ...] = PARTS,
) -> Search:
    """A whole search, with a clock that a measurement moves on by one second."""
    search = Search(START)
    clock = iter(np.arange(0, 1e6))

    def compare(step: Any, variants: dict[str, Any]) -> Comparison:
        weights = [case.node.count for case in step.cases]
        return compare_cases(step.cases, weights, variants, measure, lambda: seconds - next(clock))

    for stage in plan(search.table, CASES, LAYOUTS, parts, kernels):
        search.run(stage.steps, compare)
    return search


def test_the_descent_finds_the_optimum() -> None:
    search = searched()
    found = search.table
    # Half as many programs in each of two rounds.
    best = Entry(**BEST, programs=2)
    for key, classes in found.streaming.items():
        # No contiguous node of ResNet-50 is as small as the first class and walked plane by plane.
        served = {launch_class(case) for case in CASES if case.geometry.channels_last == key[1]}
        assert classes == tuple(
            (limit, best if i in served else ENTRY) for i, (limit, _) in enumerate(START.streaming[key])
        )
    for key, entry in found.ticketed.items():
        # Its rows follow the cache.
        assert entry == best._replace(inner=ENTRY.inner)
        sizes = {case.geometry.numel for case in CASES if (case.direction, case.geometry.channels_last) == key}
        assert found.one_launch_elements[key] == max(size for size in sizes if size <= ONE_LAUNCH_PAYS)
    assert (found.second_phase_reversed, found.second_phase_evicts_first, found.channel_major) == (False, True, False)
    assert search.not_searched == []


def test_gains_are_those_of_the_times() -> None:
    """Of the geometric mean over the cases of a class, as often as each node occurs."""
    search = searched(kernels=["statistics"], parts=("tiles",))
    first = next(change for change in search.changes if change.place.endswith("channels_last[2].elements"))
    assert (first.before, first.after) == ("1024", "4096")
    assert first.gain == pytest.approx(1.1**2 - 1)
    weights, present, other = [1, 3], [1.0, 4.0], [2.0, 2.0]
    comparison = Comparison(weights, {PRESENT: present, AGAIN: present, "other": other})
    assert comparison.gain("other") == pytest.approx((0.5 * 2**3) ** (1 / 4) - 1)
    assert comparison.gain("other", [0]) == pytest.approx(-0.5)
    assert comparison.noise == 0


@pytest.mark.parametrize(("factor", "changes"), [(1.05, True), (1.4, False)])
def test_a_gain_within_the_noise_is_ignored(factor: float, changes: bool) -> None:
    """No step gains more than a quarter."""

    def measure(case: Case, variants: dict[str, Any]) -> Measured:
        medians = measure_invented(case, variants).medians
        # Equal times, but for a drift from one call to the next.
        return Measured(medians | {PRESENT: medians[PRESENT] * factor**0.5, AGAIN: medians[AGAIN] / factor**0.5}, {})

    search = searched(measure, kernels=["reduce"], parts=("tiles",))
    assert bool(search.changes) == changes
    assert all(taken.comparison.noise == pytest.approx(factor - 1) for taken in search.taken)


def test_noise_that_cancels_on_average_counts() -> None:
    rng = np.random.default_rng(0)
    jitter = np.exp(0.1 * rng.standard_normal(400))
    comparison = Comparison([1] * 400, {PRESENT: list(jitter), AGAIN: [1.0] * 400})
    assert comparison.noise == pytest.approx(2 * 0.1 / 400**0.5, rel=0.2)


def test_the_search_ends_with_its_time() -> None:
    whole = searched()
    seconds = 200
    search = searched(seconds=seconds)
    measured = sum(len(taken.step.cases) for taken in search.taken)
    next_step = whole.taken[len(search.taken)].step
    assert seconds - len(next_step.cases) <= measured <= seconds
    assert search.changes == whole.changes[: len(search.changes)]
    assert search.changes
    # The rest is named, each place once, and again where it was to be searched a second time.
    rest = [taken.step.name for taken in whole.taken[len(search.taken) :] if not taken.step.repeated]
    assert [name for name in search.not_searched if not name.endswith(" again")] == rest
    entries = {taken.step.entry for taken in search.taken if taken.change}
    assert {name.rpartition(".")[0] for name in search.not_searched if name.endswith(" again")} == entries


def test_candidates_that_fail_are_dropped() -> None:
    """Two warps fail on the last case that a step measures: the search goes on, and takes the best of the others."""

    def measure(case: Case, variants: dict[str, Any]) -> Measured:
        failing = case == [c for c in CASES if c.geometry.channels_last and c.direction == "backward"][-1]
        bad = [n for n, t in variants.items() if failing and t.ticketed["backward", True].warps == 2]
        medians = measure_invented(case, variants).medians
        return Measured({n: m for n, m in medians.items() if n not in bad}, dict.fromkeys(bad, "spills"))

    search = searched(measure, kernels=["backward"])
    assert search.table.ticketed["backward", True].warps == 4
    assert search.table.ticketed["backward", False].warps == 2
    assert search.table.ticketed["backward", True].elements == BEST["elements"]
    taken = next(t for t in search.taken if t.step.name == "ticketed.backward.channels_last.warps")
    assert taken.comparison.dropped == {"2": "spills"}
    assert taken.comparison.candidates == ["8"]


def test_a_present_table_that_fails_ends_the_search() -> None:
    with pytest.raises(PresentFailsError, match="wrong output"):
        searched(lambda case, variants: Measured({}, {PRESENT: "wrong output"}))
    with pytest.raises(OutOfTimeError):
        compare_cases(CASES, [1] * len(CASES), {}, measure_invented, lambda: 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("node", [Node(f, 5, 3, 3, 1, forked) for f in FORMS for forked in (False, True)], ids=str)
def test_what_is_timed_is_right(direction: str, node: Node, device: torch.device) -> None:
    for dtype, layout in (("float64", "contiguous"), ("bfloat16", "channels_last")):
        case = Case(direction, node, 2, dtype, layout)
        tensors = case.tensors(device)
        exact = tensors.exact()
        results = tensors.results()
        assert directions.fault(results, exact, getattr(torch, dtype)) is None
        assert ("mask" in exact) == (direction == "forward" and node.form == FORMS[1])
        for name in exact:
            wrong = results | {name: results[name] * 1.05}
            assert f"wrong {name}" in (directions.fault(wrong, exact, getattr(torch, dtype)) or "")
            nan = results | {name: results[name] * float("nan")}
            assert f"wrong {name}" in (directions.fault(nan, exact, getattr(torch, dtype)) or "")


def test_wrong_and_impossible_candidates_have_no_times(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    table = START
    variants = {
        "present": table,
        "wrong": table._replace(channel_major=True),
        "impossible": table._replace(second_phase_reversed=False),
    }
    forward = gpu.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        if not launch_table.SECOND_PHASE_REVERSED:
            raise OutOfResources(300_000, 232_448, "shared memory")
        y, mask, stats = forward(*args, **kwargs)
        return (y * 1.05 if launch_table.CHANNEL_MAJOR else y), mask, stats

    monkeypatch.setattr(gpu, "forward", broken)
    monkeypatch.setattr(timing, "warm_ups", lambda device: 0)
    case = Case("forward", Node(FORMS[0], 4, 3, 3, 1), 2, "float32", "contiguous")
    measured = directions.measure(case, variants, 2, device)
    assert list(measured.medians) == ["present"]
    assert measured.medians["present"] > 0
    assert "wrong output" in measured.dropped["wrong"]
    assert "OutOfResources" in measured.dropped["impossible"]


def test_no_call_meets_what_the_one_before_has_left(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "rotation", lambda size, calls, device: 5)
    monkeypatch.setattr(timing, "warm_ups", lambda device: 1)
    used: list[int] = []
    monkeypatch.setattr(directions, "_faults", lambda *args: {})
    monkeypatch.setattr(directions.Direction, "run", lambda self: used.append(id(self)))
    case = Case("forward", Node(FORMS[0], 4, 3, 3, 1), 2, "float32", "contiguous")
    directions.measure(case, dict.fromkeys(("a", "b", "c"), START), 3, device)
    assert len(used) == 12
    assert all(len(set(used[i : i + 5])) == 5 for i in range(len(used) - 4))


def test_launches_are_compiled_ahead(tmp_path: Path) -> None:
    """For a GPU that is not there, in another process, the tiles of the table that was asked for."""
    other = START._replace(streaming=dict.fromkeys(START.streaming, ((None, Entry(512, 32, 4, 2, 1)),)))
    case = Case("forward", Node(FORMS[0], 64, 8, 8, 1), 2, "bfloat16", "channels_last")
    with audit.compiler_environment(), pytest.MonkeyPatch.context() as m:
        m.setenv("TRITON_CACHE_DIR", str(tmp_path))
        m.setenv("PYTHONPATH", str(Path(tuning.__file__).parent.parent), prepend=":")
        with ahead.compiler("sm_90", {"L2_BYTES": 2**20}) as compiler:
            assert compiler.compile([([case], other)], 300) == []
            (failure,) = compiler.compile([([replace(case, dtype="int8")], other)], 300)
    assert "KeyError" in failure
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert compiled == {"_statistics_kernel", "_normalise_kernel"}
    for path in tmp_path.rglob("_normalise_kernel.json"):
        assert json.loads(path.read_text())["num_warps"] == 2


def command(*arguments: str) -> int:
    return benchmarks.main(["tune", *arguments])


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command searches from ``START``, warms nothing up, and prints whole tables."""
    monkeypatch.setenv("COLUMNS", "170")
    monkeypatch.setattr(timing, "warm_ups", lambda device: 0)
    read = launch_file.read
    monkeypatch.setattr(launch_file, "read", lambda path=None: START if path is None else read(path))


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_runs")
def test_without_a_gpu_the_kernels_own_table_is_safe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Were one of these let through, it would end here, before anything is written.
    monkeypatch.setattr(tuning, "Session", None)
    before = launch_file.PATH.read_bytes()
    record = ["--record", str(tmp_path / "record.json")]

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            command(*arguments, *record)
        return capsys.readouterr().err

    assert "needs a CUDA GPU, or --short" in refused()
    for output in ([], ["--output", str(launch_file.PATH)]):
        assert "needs a CUDA GPU or --output" in refused("--short", *output)
    assert f"--output: must be a file, but {tmp_path} is a folder" in refused("--short", "--output", str(tmp_path))
    assert "--minutes: must be a finite number above 0, but got '0'" in refused("--minutes", "0", "--short")
    assert list(tmp_path.iterdir()) == []
    assert launch_file.PATH.read_bytes() == before


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_runs")
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the interpreter: one kernel's tiles, and one launch against three."""
    output, record = tmp_path / "new" / "table.json", tmp_path / "record" / "tune.json"
    arguments = ["--short", "--layout", "contiguous", "--kernel", "apply", "--part", "tiles", "--part", "one-launch"]
    assert command(*arguments, "--repetitions", "1", "--output", str(output), "--record", str(record)) == 0
    assert "which mean nothing" in capsys.readouterr().out
    table = launch_file.read(output)
    (search,) = table.tuned_on
    assert search["gpu"] is None
    assert "mean nothing" in search["note"]
    assert search["torch"] == torch.__version__
    steps = json.loads(record.read_text())["steps"]
    assert [step["place"] for step in steps][:3] == [
        "streaming.apply.contiguous[0].elements",
        "one_launch_elements.forward.contiguous",
        "one_launch_elements.backward.contiguous",
    ]
    assert set(steps[0]["medians_ms"]) == {PRESENT, AGAIN, "512", "2048", "4096"}
    assert all(len(times) == len(FORMS) for step in steps for times in step["medians_ms"].values())
    assert all(step["dropped"] == {} for step in steps)
    changes = [step["change"] for step in steps if step["change"]]
    assert changes == search["changes"]
    if not changes:
        assert table.constants == START.constants


@pytest.mark.usefixtures("small_runs")
def test_what_is_found_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Both layouts and every part, on invented times; the kernels agree with float64 under the table that comes out."""
    monkeypatch.setattr(tuning, "measure", lambda case, variants, *rest: measure_invented(case, variants))
    output, record = tmp_path / "table.json", tmp_path / "record.json"
    paths = ["--output", str(output), "--record", str(record)]
    assert command("--short", *paths) == 0
    printed = capsys.readouterr().out
    table = launch_file.read(output)
    assert table.streaming["reduce", True][0][1].elements == BEST["elements"]
    assert table.one_launch_elements == dict.fromkeys(table.ticketed, 256)
    assert not table.second_phase_reversed
    gains = {change["place"]: change["gain"] for change in table.tuned_on[0]["changes"]}
    assert gains["streaming.reduce.channels_last[0].elements"] == pytest.approx(1.1**2 - 1)
    assert gains["second_phase_reversed"] == pytest.approx(0.1)
    assert "streaming.reduce.channels_last[0].elements     │   1024 │  4096 │  +21.0%" in printed
    # Three launches have two entries, one has one; warps, inner and stages are what they were.
    assert f"backward  │ contiguous    │      256 │ {1.1 ** (2 + math.log2(1.5) + 1 + 5) - 1:+.1%} │  0.0%" in printed
    assert "second_phase_reversed     │ on -> off │  +10.0% │   +10.0% │ +10.0% │  0.0% │  off" in printed
    with launch_table.using(**table.constants):
        for form in FORMS:
            for layout in LAYOUTS:
                p = problem(form, (2, 8, 5, 3), torch.float32, device, layout=layout)
                exact = run_node(reference, p, torch.float64)
                assert_close(run_node(fused, p), exact, TOLERANCE[torch.float32])
    output.unlink()
    assert command("--short", "--dry-run", *paths) == 0
    assert not output.exists()
    assert command("--short", "--minutes", "1e-9", *paths) == 0
    assert "places were not searched: streaming.normalise.channels_last[0].elements" in capsys.readouterr().out
    assert not output.exists()
