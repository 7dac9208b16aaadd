"""Tables on a terminal of 80 columns, where nothing may be cut, and progress in a log file."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from console import progress
from console.progress import Progress, track
from console.rows import Rows
from count import audit, coverage, host, traffic
from count.budgets import Loop, Row, StepCount
from count.ceilings import Ceiling
from measure import kernel_profile, measuring, network_timing, node_timing
from measure.variants import VARIANTS
from record.results import KernelTime, NetworkTime, NodeTime, Results, Run, StepProfile
from report import command as report
from rich.console import Console
from science import agreement, records
from science import command as science
from science.command import EXPERIMENTS
from tuning import command as tuning
from tuning.directions import Case
from tuning.places import ONE_LAUNCH, OneLaunchLimit, Switch
from tuning.search import AGAIN, PRESENT, Change, Comparison, Search, Taken
from workloads.nodes import FORMS
from workloads.problems import LAYOUTS
from workloads.zoo import NETWORKS

TERMINAL = 80
GPU = "NVIDIA H100 80GB HBM3"
ENVIRONMENT = {"gpu": GPU, "torch": "2.14.1", "triton": "3.8.0", "commit": "abc", "time": "", "driver": "1"}
SHAPES = ((64, 112, 112), (512, 28, 28), (2048, 7, 7))


def node_times():
    return [
        NodeTime([1.2345 * (i + 1)], form, *shape, 256, "bfloat16", "channels_last", phase, 4e9, 4e3, variant, False, 0)
        for form, shape, phase in product(FORMS, SHAPES, ("forward", "backward", "both"))
        for i, variant in enumerate(VARIANTS)
    ]


def kernel_times():
    return [
        KernelTime([0.1234], form, *shape, 256, "bfloat16", "channels_last", "forward", 4e8, 4e3, kernel, 4.5e8)
        for form, shape, kernel in product(FORMS, SHAPES, ("statistics", "normalise"))
    ]


def network_times():
    return [
        NetworkTime([123.456, 234.5], name, mode, 256, 224, way, 45_678_000_000, 1e-2)
        for name, mode, way in product(
            ("torchvision/resnet50", "torchvision/wide_resnet50_2"), network_timing.MODES, network_timing.WAYS
        )
    ]


def steps():
    kinds = {kind: 12.34 + i for i, kind in enumerate((*kernel_profile.KINDS, kernel_profile.OTHER))}
    return [StepProfile("torchvision/resnet50", 256, way, 234.56, 1.23, kinds, []) for way in network_timing.WAYS]


def goals():
    return report._goal_table(
        Results(GPU, [ENVIRONMENT], [*node_times(), *kernel_times(), *network_times()], Path("x"))
    )


def left_out(tmp_path):
    run = Run(tmp_path / "x.json", {})
    run.leave_out(
        "torch.compile max-autotune on norm+add(norm)+relu 512x28x28, batch 256, bfloat16 channels_last", "[x]"
    )
    run.leave_out("apex groupbn", "No module named 'apex' in /opt/conda/lib/python3.12/site-packages/" + 9 * "nested/")
    return measuring.left_out(run)


def traffic_tables():
    launch = traffic.LaunchTraffic("forward_with_tickets", 3.0625, 1.0625, 0.0123, 0.0234)
    eager = dict.fromkeys(traffic.PHASES, 16.0)
    nodes = [
        traffic.NodeTraffic(form, way, layout, (256, *shape), {key: [launch] for key in traffic.PHASES}, eager)
        for form, way, layout, shape in product(FORMS, traffic.WAYS, LAYOUTS, SHAPES)
    ]
    totals = [
        traffic.Total(name, way, layout, mode, 8.8765, 0.0123, 15.3, 2_800_000_000)
        for name, way, layout, mode in product(("resnet18", "resnet50"), traffic.WAYS, LAYOUTS, traffic.MODES)
    ]
    return (
        traffic._node_table(nodes, "bfloat16"),
        traffic._launch_table(nodes),
        traffic._total_table(totals, "bfloat16", 4.0),
    )


def audited():
    row = Row(
        "sm_90", "reduce", FORMS[2], "training backward", "bfloat16", "channels_last", (4096, 64, 256, 128),
        "", (65535, 32, 1), 8, 255, 16, 114688, 1234, {128: 12, 32: 4, 8: 2}, {128: 2, 16: 4}, 0, 0, 64, 128, 64,
        65536,
        Loop(
            16, 2, 23.9, {"ALU": 12.4}, 6.1, 10, 62.06, 0.06, False, 14336, 4.0, Ceiling(11.5, "issue"),
            {"H100": Ceiling(2.9, "in flight"), "H200": Ceiling(3.2, "last wave")},
        ),
    )  # fmt: skip
    return [
        replace(row, kernel=kernel, form=form, layout=layout, hash=f"{kernel} {form} {layout}")
        for kernel, form, layout in product(("statistics", "reduce", "normalise"), FORMS, LAYOUTS)
    ]


def host_times():
    times = {form: dict.fromkeys(host.VARIANTS, host.Times(1102.5, 1146.5, 6)) for form in FORMS}
    names = ("<method 'run_backward' of 'torch._C._EngineBase' objects>", "functions.py: _call_backward")
    return host._table(times), host._profile_table(dict.fromkeys(names, 1102.5))


def covered():
    return [
        coverage.Coverage(
            name, 155, 104, (104, 104), 53, dict.fromkeys(FORMS, 100), (0, 0), 49,
            {"its output goes to a SEModule, not to a ReLU": 16, "layer1.0.bn1 has a forward hook": 1}, 2.5,
            dict.fromkeys(coverage.KINDS, 1.5e-12),
        )
        for name in NETWORKS
    ]  # fmt: skip


def tuned():
    cases = [Case("backward", n, 256, "bfloat16", "channels_last") for n in tuning.resnet50_nodes()[:3]]
    times = {variant: [1.0, 2.0, 3.0] for variant in (PRESENT, AGAIN)}
    limit = Taken(
        OneLaunchLimit("backward", "channels_last", cases),
        Comparison([1, 1, 1], {**times, ONE_LAUNCH: [3, 2, 1]}),
        None,
    )
    switch = Taken(
        Switch("second_phase_evicts_first", [replace(cases[0], direction="forward"), *cases[1:]]),
        Comparison([1, 1, 1], {**times, "off": [0.5, 2.0, 4.0]}),
        None,
    )
    places = [f"one_launch_elements.{direction}.channels_last" for direction in ("forward", "backward")]
    places += [f"streaming.{kernel}.channels_last[2].elements" for kernel in ("statistics", "normalise")]
    search = Search(None, [
        Taken(limit.step, limit.comparison, Change(place, "411041792", "102760448", 0.1234, 0.0123)) for place in places
    ])  # fmt: skip
    return tuning._changes_table(search), tuning._one_launch_table([limit]), tuning._switches_table([switch])


def experiments():
    folder = report.RECORD / "science"
    for name, experiment in EXPERIMENTS.items():
        content = records.read(folder, name)
        yield experiment.title(content), experiment.HEADINGS, experiment.summary(content)
        found = content["agreements"]
        yield agreement.title(found), agreement.HEADINGS, agreement.summary(found)


def printed(width, *tables):
    """What a terminal so wide is shown; ``tables``: what to print, or what prints itself."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for table in tables:
        if callable(table):
            table(console)
        else:
            console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def words(text):
    """How often there is each, whatever lines and commas stand between them."""
    return Counter(re.sub(r"[\u2500-\u257f,]", " ", text).split())


TABLES = {
    "nodes": lambda tmp_path: [node_timing.table(node_times(), f"Nodes, bfloat16 channels_last ({GPU})")],
    "networks": lambda tmp_path: [network_timing.table(network_times(), f"Networks, one step ({GPU})")],
    "kernels": lambda tmp_path: [kernel_profile.kernel_table(kernel_times(), f"Our streaming kernels ({GPU})")],
    "steps": lambda tmp_path: [kernel_profile.step_table(steps(), f"A training step by kind of kernel ({GPU})")],
    "goals": lambda tmp_path: [goals()],
    "left out": lambda tmp_path: [left_out(tmp_path)],
    "traffic": lambda tmp_path: traffic_tables(),
    "audit": lambda tmp_path: [
        lambda console: audit.show(audited(), console),
        audit.goal_table(audited(), [StepCount("sm_90", "channels_last", 294, 23)]),
    ],
    "host": lambda tmp_path: host_times(),
    "coverage": lambda tmp_path: [
        coverage._table(covered(), "triton"),
        coverage._left_table(covered()),
    ],
    "tune": lambda tmp_path: tuned(),
    "science": lambda tmp_path: [
        lambda console, of=of: science._print_table(console, *of) for of in experiments()
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_nothing_is_cut_at_80_columns(name, tmp_path):
    """Every word of a terminal without end, and in the cells as often: only keys and headings are said again."""
    tables = TABLES[name](tmp_path)
    endless, narrow = words(printed(10_000, *tables)), words(printed(TERMINAL, *tables))
    # A path may be longer than any line.
    missing = {word: count for word, count in (endless - narrow).items() if len(word) < TERMINAL}
    assert missing == {}
    assert "…" not in narrow


def test_the_data_is_in_the_tables(tmp_path):
    """So that a word that is nowhere is missed."""
    text = {name: words(printed(TERMINAL, *tables(tmp_path))) for name, tables in TABLES.items()}
    for name in ("nodes", "kernels", "traffic", "audit", "host", "coverage", "left out"):
        assert text[name]["norm+add(norm)+relu"] > 0, name
    assert text["nodes"]["1.2345"] == text["nodes"]["9.8760"] == 27
    assert text["networks"]["torchvision/wide_resnet50_2"] >= 20
    assert text["steps"]["234.56"] == 12
    assert text["traffic"]["0.0234"] == 12 * 4
    assert text["audit"]["12·128"] == 18
    assert text["tune"]["streaming.statistics.channels_last[2].elements"] >= 1
    assert text["tune"]["102760448"] == 4


def test_a_table_as_wide_as_the_line_stays_one():
    rows = Rows("title", ("key",), ("a value", "another"), "caption")
    rows.add("one two", "1.5", "[red]WRONG")
    whole = printed(40, rows)
    assert whole.splitlines()[0].strip() == "title"
    assert [line.split("│")[1:-1] for line in whole.splitlines() if "one" in line] == [
        [" one two ", "     1.5 ", "   WRONG "]
    ]
    # Keys in every part, the title and the caption once.
    parts = words(printed(22, rows))
    assert (parts["key"], parts["one"], parts["title"], parts["caption"]) == (2, 2, 1, 1)
    assert (parts["1.5"], parts["WRONG"]) == (1, 1)
    # Where not even a word fits, it is broken and still there.
    broken = words(printed(12, rows))
    assert (broken["WRO"], broken["NG"], broken["1.5"]) == (1, 1, 1)
    assert words(printed(40, Rows("title", ("key",), ("value",)))) == Counter(["title", "key", "value"])


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still until they are set."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_progress_reaches_a_log_file(clock):
    console = Console(file=io.StringIO(), width=20)
    for _ in track(range(8), "Counting [x]", console):
        clock[0] += 4
    assert console.file.getvalue().splitlines() == ["Counting [x]: 3/8, 12 s", "Counting [x]: 6/8, 24 s"]


def test_progress_says_what_is_being_done(clock):
    console = Console(file=io.StringIO())
    with Progress(console, "Timing", 5, done=2) as p:
        p.advance()
        clock[0] += 30
        p.detail("norm+relu")
        p.detail("norm+add+relu")
        p.advance()
        assert p.rate == pytest.approx(2 / 30)
    assert console.file.getvalue() == "Timing: 3/5, 30 s, norm+relu\n"


@pytest.mark.parametrize("settings", [{"force_terminal": True}, {"quiet": True}], ids=["terminal", "quiet"])
def test_no_lines_beside_a_bar(settings, clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), **settings)
    for _ in track(iter("abc"), "Counting", console, 3):
        clock[0] += 20
    assert "0 s" not in console.file.getvalue()
    assert ("Counting" in console.file.getvalue()) == ("force_terminal" in settings)
