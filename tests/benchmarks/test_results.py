"""Result files, what is made of them, and the goals, on made-up measurements whose figures are known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from measure import kernel_profile
from record import results
from record.results import KernelTime, NetworkTime, NodeTime, ResultError, Results, Run, StepProfile
from report import command as report
from report import goals, plots

ROOT = Path(__file__).parents[2]
NODE = ("norm+add+relu", 256, 56, 56, 256, "bfloat16", "channels_last")
PROJECTION = ("norm+add(norm)+relu", 512, 28, 28, 256, "bfloat16", "channels_last")
GPU = {
    "time": "2030-01-01T00:00:00+00:00", "commit": "abc", "gpu": "NVIDIA H200", "driver": "1", "cuda": "13.0",
    "processor": "x86_64", "instruction_set": "AVX2", "threads": 16, "python": "3.12",
    "torch": "2.11.0", "triton": "3.6.0",
}  # fmt: skip


def node(place, variant, ms, phase="both", cuda_graph=False):
    return NodeTime([ms, ms, ms], *place, phase, 4e9, 4000.0, variant, cuda_graph, 1e-3)


def network(variant, ms, peak):
    return NetworkTime([ms], "torchvision/resnet50", "training", 256, 224, variant, peak, 1e-2)


def kernel(place, name, ms, dram=None):
    return KernelTime([ms], *place, "forward", 4e9, 4000.0, name, dram)


def of(measurements, made=GPU):
    return Results(made["gpu"], [made], measurements, Path("nvidia-h200"))


MEASURED = [
    node(NODE, "resfused", 2.0), node(NODE, "resfused again", 2.1), node(NODE, "eager", 8.0),
    node(NODE, "torch.compile", 3.0), node(NODE, "torch.compile max-autotune", 2.5),
    node(PROJECTION, "resfused", 1.0), node(PROJECTION, "eager", 1.0), node(PROJECTION, "torch.compile", 3.0),
    network("resfused", 40.0, 102), network("resfused, CUDA graph", 32.0, 110), network("eager", 64.0, 100),
    network("torch.compile", 40.0, 90), network("torch.compile max-autotune", 36.0, 95),
    kernel(NODE, "statistics", 1.0), kernel(NODE, "normalise", 1.25, 5e9),
    StepProfile("torchvision/resnet50", 256, "resfused", 40.0, 1.0, {"resfused": 9.0}, [("_apply_kernel", 49, 3.0)]),
]  # fmt: skip


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Runs say that they were made on it."""

    def use(**changes):
        monkeypatch.setattr(results, "environment", lambda *device: {**GPU, **changes})

    use()
    return use


def test_calls_add_to_one_file_and_the_latest_counts(on_a_gpu, tmp_path):
    path = tmp_path / "h200.json"
    first = Run(path, {"minutes": 7})
    first.add(MEASURED)
    first.leave_out("apex groupbn", "not installed")
    on_a_gpu(time="2030-01-02T00:00:00+00:00", commit="def")
    Run(path, {}).add([node(NODE, "eager", 6.0)])
    (loaded,) = results.load([path]).values()
    assert loaded.machine == "NVIDIA H200"
    assert [made["commit"] for made in loaded.environments] == ["abc", "def"]
    assert len(loaded.measurements) == len(MEASURED)
    times = {(t.form, t.variant): t.milliseconds for t in loaded.of(NodeTime)}
    assert times["norm+add+relu", "eager"] == 6.0
    assert times["norm+add+relu", "torch.compile"] == 3.0
    assert loaded.of(KernelTime) == [m for m in MEASURED if isinstance(m, KernelTime)]
    assert json.loads(path.read_text())["runs"][0]["left_out"] == [{"what": "apex groupbn", "reason": "not installed"}]


def test_a_run_that_is_cut_off_is_in_the_file(on_a_gpu, tmp_path):
    path = tmp_path / "h200.json"
    run = Run(path, {})
    assert not path.exists()
    run.add([node(NODE, "eager", 6.0)])
    assert len(results.load([path])["NVIDIA H200"].measurements) == 1


def test_files_that_cannot_be_added_to_stay_as_they_are(on_a_gpu, tmp_path):
    path = tmp_path / "h200.json"
    Run(path, {}).add(MEASURED)
    before = path.read_bytes()
    on_a_gpu(gpu="NVIDIA A100")
    with pytest.raises(ResultError, match="has results of NVIDIA H200, and this is NVIDIA A100: give another"):
        Run(path, {})
    assert path.read_bytes() == before
    for damaged in ("{", "[]", '{"format": 0}'):
        path.write_text(damaged)
        with pytest.raises(ResultError, match=str(path)):
            Run(path, {})
        assert path.read_text() == damaged


def test_quantiles_bandwidth_and_csv(tmp_path):
    time = NodeTime([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], *NODE, "both", 7e9, 4000.0, "resfused", False, 1e-3)
    assert (time.milliseconds, time.quantile(20), time.quantile(80)) == (3.5, 2.0, 5.0)
    assert time.gb_s == pytest.approx(2000)
    assert time.of_copy == pytest.approx(0.5)
    paths = results.write_csv(of([time, *MEASURED[8:]]), tmp_path / "x")
    assert [p.name for p in paths] == ["x-nodes.csv", "x-kernels.csv", "x-networks.csv"]
    (row,) = csv.DictReader(paths[0].open())
    assert (row["variant"], row["p20_ms"], float(row["of_copy"])) == ("resfused", "2.0", pytest.approx(0.5))
    steps = list(csv.DictReader(paths[2].open()))
    assert float(steps[0]["images_s"]) == pytest.approx(6400)


def rows(measurements):
    return [goals.row(goal, of(measurements))[2:] for goal in goals.GOALS]


def test_goals():
    """In the order of the goals, from the made-up numbers by hand."""
    assert rows(MEASURED) == [
        # 4e9 bytes in 1.25 ms are 3200 GB/s.
        ("0.8 (normalise of norm+add+relu 256x56x56)", "no"),
        # The root of 4 and 1.
        ("2x (2 nodes, eager)", "no"),
        # Of 1.5 and 3 the default mode's is 2.12, of max-autotune's one node 1.25.
        ("1.25x (1 nodes, torch.compile max-autotune)", "no"),
        ("not measured yet", ""),
        ("2x (resfused, CUDA graph against eager)", "yes"),
        ("1.12x (resfused, CUDA graph against torch.compile max-autotune)", "no"),
        ("8,000 (resfused, CUDA graph)", "yes"),
        ("1.02x (0.0 GB)", "yes"),
        ("not measured yet", ""),
    ]


def test_no_goal_is_reached_without_measurements():
    assert set(rows([])) == {("not measured yet", "")}
    assert {goals.row(goal, None)[2] for goal in goals.GOALS} == {"not measured yet"}


def test_goals_look_only_at_their_own_settings():
    small = [
        replace(m, batch=32, cuda_graph=True) for m in MEASURED if isinstance(m, NodeTime) and m.variant != "eager"
    ] + [replace(node(NODE, "eager", 1.9), batch=32, cuda_graph=True)]
    assert rows(small)[-1] == ("1 (of 1; least 0.95x, norm+add+relu 256x56x56)", "no")
    assert {reached for reached, _ in rows(small)[:-1]} == {"not measured yet"}
    float16 = [replace(m, dtype="float16") for m in (node(NODE, "resfused", 2.0), node(NODE, "cuDNN graph", 2.4))]
    assert rows(float16)[3] == ("1.2x (1 nodes, cuDNN graph)", "yes")
    stem = [kernel(("norm+relu", 64, 112, 112, *NODE[4:]), "apply", 5.0)]
    assert rows(stem)[0] == ("not measured yet", "")


def test_markdown_says_what_was_measured_where():
    plots = {"NVIDIA H200": [ROOT / "benchmarks/results/nvidia-h200-images.png"]}
    parts = report.markdown({"NVIDIA H200": of(MEASURED)}, plots, ROOT)
    assert parts[report.OPENING] == "No CPU has been measured yet."
    text = parts[report.SPEED]
    assert "| on NVIDIA H200 | goal | reached on NVIDIA H200 | met |" in text
    assert "| on a CPU, two threads | goal | reached | met |" in text
    assert "NVIDIA H200; driver 1; torch 2.11.0, triton 3.6.0, commit abc." in text
    assert "| torchvision/resnet50 training, bfloat16 | 256 | resfused, CUDA graph | 8,000 | 2.00 | 0.0 |" in text
    assert "| bfloat16 channels_last | 256 | torch.compile | 2 | 2.12 | 1.50 |" in text
    assert "(benchmarks/results/nvidia-h200-images.png)" in text


def test_the_readme_says_what_the_committed_results_say():
    """What stands between the markers is what the report makes."""
    readme = report.checked(ROOT / "README.md")
    by_machine = results.load(report.record())
    shown = {name: sorted(report.RECORD.glob(f"{r.stem.name}-*.png")) for name, r in by_machine.items()}
    expected = report.markdown(by_machine, shown, ROOT)
    for part, text in expected.items():
        assert readme.partition(report.begin(part))[2].partition(report.end(part))[0].strip() == text


def test_a_readme_without_markers_stays_as_it_is(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n")
    with pytest.raises(ResultError, match="for the tables to stand between"):
        report.checked(readme)
    readme.write_text("a\n" + "\nbetween\n".join(f"{report.begin(p)}\nold\n{report.end(p)}" for p in report.PARTS))
    for text in ("new", "newer"):
        report.put_into(readme, {part: f"{text} {part}" for part in report.PARTS})
    expected = (f"{report.begin(p)}\n\nnewer {p}\n\n{report.end(p)}" for p in report.PARTS)
    assert readme.read_text() == "a\n" + "\nbetween\n".join(expected)


def test_plots_of_everything(tmp_path):
    paths = plots.write_plots(of(MEASURED), tmp_path / "nvidia-h200")
    assert [p.name.removeprefix("nvidia-h200-") for p in paths] == [
        "speedup-bfloat16-channels_last-batch-256.png", "bandwidth-bfloat16-channels_last-batch-256.png",
        "kernels-bfloat16-channels_last-batch-256.png", "images.png", "memory.png",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_the_speedup_plot_shows_the_ratios():
    figure = plots._speedup([m for m in MEASURED if isinstance(m, NodeTime)], "setting")
    (axes,) = figure.axes
    drawn = {s.get_label(): sorted(s.get_offsets().tolist()) for s in axes.collections}
    assert drawn == {
        "resfused again": [[1.05, 0]], "eager": [[1.0, 1], [4.0, 0]], "torch.compile": [[1.5, 0], [3.0, 1]],
        "torch.compile max-autotune": [[1.25, 0]],
    }  # fmt: skip
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "norm+add+relu  256x56x56",
        "norm+add(norm)+relu  512x28x28",
    ]


def test_the_report_command(on_a_gpu, tmp_path, capsys):
    import run

    path = tmp_path / "h200.json"
    Run(path, {}).add(MEASURED)
    readme = tmp_path / "README.md"
    readme.write_text("".join(report.begin(part) + report.end(part) for part in report.PARTS))
    assert run.main(["report", str(path), "--readme", str(readme)]) == 0
    assert "| 2.00 |" in readme.read_text()
    assert "![h200-images](h200-images.png)" in readme.read_text()
    assert (tmp_path / "h200-nodes.csv").exists()
    assert "Goals on NVIDIA H200" in capsys.readouterr().out


def test_tables_leave_empty_what_was_not_measured(capsys):
    from rich.console import Console

    wide = Console(width=250)
    report.show(of([node(NODE, "eager", 8.0), *MEASURED[8:]]), wide)
    out = capsys.readouterr().out
    assert "8.0000" in out
    assert "1.25" in out  # bytes moved over the least of them
    assert kernel_profile.kernel_table([], "").rows == []
