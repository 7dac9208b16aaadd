"""What is made of the record of a CPU, on made-up measurements whose figures are known."""

from dataclasses import replace
from pathlib import Path

import pytest
from measure.node_timing import TINY
from record.results import BuildTime, NetworkTime, NodeTime, Results
from report import command as report
from report import cpu_goals, gains, goals, plots

MADE = {
    "time": "2030-01-01T00:00:00+00:00", "commit": "abc", "gpu": None, "driver": None, "cuda": None,
    "processor": "A CPU", "instruction_set": "AVX2", "cores": 4, "threads": 2, "caches": {"3 Unified": "8192K"},
    "compiler": "c++ 12", "python": "3.12", "torch": "2.14.1", "triton": "3.8.0",
}  # fmt: skip
NAME = "A CPU with AVX2, 2 threads"
# Of 25.7 MB in float32.
NODE = ("norm+add+relu", 1024, 14, 14, 32)
LARGE = ("norm+add+relu", 256, 56, 56, 32)
TIMES = {"resfused": 10.0, "resfused again": 11.0, "eager": 40.0, "torch.compile": 90.0}


def node(place, variant, ms, phase="both", dtype="float32", layout="channels_last", kept=False):
    return NodeTime([ms], *place, dtype, layout, phase, 1e9, 20.0, variant, False, 1e-3, kept)


def network(variant, ms, dtype="float32"):
    return NetworkTime([ms], "torchvision/resnet50", "training", 16, 224, variant, None, 1e-3, dtype)


def of(measurements):
    return Results(NAME, [MADE], measurements, Path("a-cpu-2-threads"))


MEASURED = [
    *(node(NODE, variant, ms) for variant, ms in TIMES.items()),
    *(node(NODE, variant, ms, phase="forward", kept=True) for variant, ms in TIMES.items()),
    *(node(NODE, variant, ms, kept=True) for variant, ms in zip(TIMES, (10.0, 10.0, 20.0, 30.0), strict=True)),
    node(LARGE, "resfused", 1000.0, phase="forward", kept=True),
    node(NODE, "resfused", 10.0, dtype="bfloat16"), node(NODE, "eager", 12.0, dtype="bfloat16"),
    node((TINY.form, 8, 2, 2, 32), "resfused", 0.08), node((TINY.form, 8, 2, 2, 32), "eager", 0.05),
    network("resfused", 2000.0), network("eager", 2600.0), network("torch.compile", 2500.0),
    network("resfused", 1000.0, "bfloat16"), network("eager", 1000.0, "bfloat16"),
    BuildTime([9000.0]),
]  # fmt: skip


def rows(measurements):
    return {goal.what: goals.row(goal, of(measurements))[2:] for goal in cpu_goals.GOALS}


def test_goals():
    """From the made-up numbers by hand."""
    reached = rows(MEASURED)
    nodes = "nodes of ResNet-50, forward + backward, batch 32"
    step = "ResNet-50 training step"
    expected = {
        f"{nodes}, float32 channels_last, geometric mean against eager": (
            "4x (1 nodes; memory kept mapped 2x)", "yes",
        ),
        f"{nodes}, float32 channels_last, geometric mean against torch.compile": (
            "9x (1 nodes; memory kept mapped 3x)", "yes",
        ),
        f"{nodes}, bfloat16 channels_last, geometric mean against eager": ("1.2x (1 nodes)", "no"),
        # Where both others were timed.
        "the slowest single node and phase of those against the better of the two": (
            "2x (both of norm+add+relu 1024x14x14, float32 channels_last, memory kept mapped)", "yes",
        ),
        # 20 GB/s for 10 ms over 25.7 MB; the large one is no tensor of 6 to 50 MB.
        "norm + add + ReLU, forward, in passes of a copy, tensors of 6 to 50 MB, memory kept mapped": (
            "7.79 (the most of 1, 1024x14x14 float32 channels_last)", "no",
        ),
        f"{step}, float32, batch 16, against eager": ("1.3x (resfused against eager)", "yes"),
        f"{step}, float32, batch 16, against torch.compile": ("1.25x (resfused against torch.compile)", "yes"),
        f"{step}, bfloat16, batch 16, against eager": ("1x (resfused against eager)", "no"),
        "a tiny node, forward + backward, over eager's three operators": ("1.6x (80 us, eager 50 us)", "yes"),
        "first build": ("9 s", "yes"),
    }  # fmt: skip
    assert {what: reached[what] for what in expected} == expected
    assert {reached[what] for what in reached.keys() - expected} == {("not measured yet", "")}
    # Of nodes, steps and builds, and of what steps keep.
    assert len(reached) == 17 + 14


def test_no_goal_is_reached_without_measurements():
    assert set(rows([]).values()) == {("not measured yet", "")}


def test_goals_look_only_at_their_own_settings():
    others = [replace(m, batch=m.batch * 2) for m in MEASURED if not isinstance(m, BuildTime)]
    others = [m for m in others if not isinstance(m, NodeTime) or m.channels != TINY.channels]
    assert set(rows(others).values()) == {("not measured yet", "")}


def test_the_headline_is_of_nodes_with_the_default_memory():
    # The root of 4 and 1.2.
    assert gains.headline(of(MEASURED)) == (
        "ResNet-50's nodes, forward + backward: 2.2 times as fast as eager (2 timed), 9.0 times as fast as "
        "torch.compile (1 timed)"
    )
    assert gains.headline(of([])) == ""


def test_the_picture_shows_the_ratios():
    figure = gains.draw(of(MEASURED))
    float32, bfloat16, networks = figure.axes
    drawn = {s.get_label(): s.get_offsets().tolist() for s in float32.collections}
    assert drawn == {"against eager": [[4.0, 0.0]], "against torch.compile": [[9.0, 0.0]]}
    assert bfloat16.collections[0].get_offsets().tolist() == [[1.2, 0.0]]
    assert [bar.get_width() for bar in networks.patches] == pytest.approx([2600 / 2500, 1.3, 1.0])
    slow = replace(node(NODE, "torch.compile", 120.0), dtype="bfloat16")
    assert all(axes.get_xlim()[1] > 12 for axes in gains.draw(of([*MEASURED, slow])).axes[:2])
    assert [t.get_text() for t in networks.get_yticklabels()] == [
        f"torchvision/resnet50 training, {dtype}, batch 16" for dtype in ("float32", "bfloat16")
    ]


def test_pictures(tmp_path):
    paths = plots.write_plots(of(MEASURED), tmp_path / "a-cpu-2-threads")
    settings = ("float32-channels_last-batch-32", "float32-channels_last-batch-32-memory-kept-mapped",
                "bfloat16-channels_last-batch-32")  # fmt: skip
    assert [p.name.removeprefix("a-cpu-2-threads-") for p in paths] == [
        "gains.png", *(f"speedup-{setting}.png" for setting in settings)
    ]  # fmt: skip
    without_networks = plots.write_plots(of(MEASURED[:4]), tmp_path / "nodes")
    assert [p.read_bytes()[:4] for p in (*paths, *without_networks)] == [b"\x89PNG"] * 6


def test_the_readme_opens_with_the_picture_and_then_says_what_was_measured():
    shown = [Path(f"/x/results/a-cpu-2-threads-{name}.png") for name in ("gains", "speedup-float32")]
    parts = report.markdown({NAME: of(MEASURED)}, {NAME: shown}, Path("/x"))
    picture, headline = parts[report.OPENING].split("\n\n")
    assert picture == "![a-cpu-2-threads-gains](results/a-cpu-2-threads-gains.png)"
    assert headline == gains.headline(of(MEASURED))
    text = parts[report.SPEED]
    assert ".png" not in text
    assert f"| on a CPU, two threads | goal | reached on {NAME} | met |" in text
    assert "| on NVIDIA H200 | goal | reached | met |" in text
    assert (
        f"{NAME}; cores 4, instruction set AVX2, compiler c++ 12; 8192K of L3 Unified; torch 2.14.1, triton 3.8.0, "
        "commit abc."
    ) in text
    assert "| torchvision/resnet50 training, float32 | 16 | resfused | 8.0 | 1.30 |  |" in text
    # The tiny node is no node of a network.
    assert "| float32 channels_last | 32 | eager | 1 | 4.00 | 4.00 |" in text
    assert "| float32 channels_last, memory kept mapped | 32 | resfused again | 1 | 1.00 | 1.00 |" in text


def test_other_threads_and_instructions_are_another_machine():
    from record.results import machine

    assert machine(MADE) == NAME
    assert machine({**MADE, "threads": 1}) == "A CPU with AVX2, 1 threads"
    assert machine({**MADE, "instruction_set": "AVX512"}) == "A CPU with AVX512, 2 threads"
    assert machine({**MADE, "gpu": "NVIDIA H200"}) == "NVIDIA H200"
