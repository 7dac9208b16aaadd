"""One kernel, profiler or plot that fails costs its own row: what was lost is named, and the exit code says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run
import torch
from measure import kernel_profile, measuring, network_timing, node_timing, standard
from measure.measuring import Measuring
from measure.network_timing import Workload
from measure.node_timing import Comparison
from measure.timing import Deadline
from record.results import KernelTime, NetworkTime, NodeTime, Run, load
from report import command as report
from rich.console import Console
from workloads import gate
from workloads.gate import Case, Verdict
from workloads.nodes import FORMS, Node

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NODES = [Node(form, 8, 3, 3, 1) for form in FORMS[:2]]
CASES = [Case(form, "contiguous", torch.float32, gate.TRAINING, (2, 8, 2, 2)) for form in FORMS[:2]]


@pytest.fixture
def m(device, tmp_path):
    results = Run(tmp_path / "results.json", {}, device.type)
    return Measuring(results, 1.0, Deadline(60.0), device, True, Console(quiet=True))


def measured(m, kind):
    (results,) = load([m.run.path]).values()
    return results.of(kind)


def failing(monkeypatch, module, name, which):
    """``module.name`` raises where ``which`` of its arguments says so."""
    real = getattr(module, name)

    def maybe(*args, **kwargs):
        if which(*args):
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, maybe)


def comparison(m):
    return Comparison(NODES, [2], torch.float32, "contiguous", m.device, 1, variants=("resfused", "eager"))


@pytest.mark.parametrize("name", ["profile_node", "_time_node"])
def test_a_node_that_fails_is_one_row(m, monkeypatch, name):
    module = kernel_profile if name == "profile_node" else node_timing
    failing(monkeypatch, module, name, lambda c, node, *rest: node == NODES[0])
    if name == "profile_node":
        kernel_profile.profile_nodes(comparison(m), m, counters=False)
    else:
        node_timing.time_nodes([comparison(m)], m)
    kind = KernelTime if name == "profile_node" else NodeTime
    assert {t.form for t in measured(m, kind)} == {FORMS[1]}
    ((what, reason),) = m.run.left_out
    assert "norm+relu 8x3x3, batch 2" in what
    assert reason == "CUDA error: an illegal memory access"
    assert m.failed


def test_a_network_that_fails_is_one_row(m, monkeypatch):
    workloads = [Workload("small/cifar_resnet8", mode, 2, 8, "float32") for mode in ("training", "inference")]
    failing(monkeypatch, network_timing, "_timed", lambda workload, *rest: workload is workloads[0])
    network_timing.time_networks(workloads, ("resfused", "eager"), 1, m)
    assert {t.mode for t in measured(m, NetworkTime)} == {"inference"}
    ((what, _),) = m.run.left_out
    assert "training" in what
    assert m.failed


def test_a_case_of_the_gate_that_raises_is_one_case(m, monkeypatch):
    failing(monkeypatch, gate, "judge", lambda p, layout: p.form == FORMS[0])
    verdicts = gate.run_gate(m.device, CASES, m.console, "ours")
    assert [v.passed for v in verdicts] == [False, True]
    assert "2x8x2x2, training: CUDA error: an illegal memory access" in str(verdicts[0])
    assert standard._noted(m, "gate", verdicts), "what is right can be timed"
    assert [what.partition(":")[0] for what, _ in m.run.left_out] == ["resfused in the gate"]
    assert m.failed
    assert not standard._noted(m, "gate", verdicts[:1]), "nothing is right"
    wrong = Verdict(FORMS[0], "contiguous", "float32", (2, 8, 2, 2), gate.TRAINING, "output", 1.0, 0.0, 1e-5)
    assert not standard._noted(m, "gate", [*verdicts, wrong]), "something is wrong"


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """The command, of which the measuring is a node's time; its exit code and what was left out."""
    monkeypatch.setattr(measuring, "copy_bandwidth", lambda device: 1.0)
    path = tmp_path / "results.json"

    def call(*options, then=lambda: None):
        def measure(args, m):
            node_timing.time_nodes([comparison(m)], m)
            then()

        monkeypatch.setattr(standard, "measure", measure)
        code = run.main(["--results", str(path), *options])
        return code, json.loads(path.read_text())["runs"][-1]

    return call


def test_what_ends_the_measuring_leaves_what_there_was(whole, capsys):
    def broken():
        raise ValueError("out of the blue")

    code, made = whole(then=broken)
    assert code == 1
    assert len(made["nodes"]) == 12
    assert made["left_out"] == [{"what": "the rest of the run", "reason": "ValueError: out of the blue"}]
    said = capsys.readouterr().out
    assert "Nodes, float32 contiguous" in said
    assert said.rindex("out of the blue") > said.rindex("wrote "), "named at the end"


def test_a_plot_that_fails_costs_no_result(whole, monkeypatch, capsys):
    failing(monkeypatch, report, "write_plots", lambda *args: True)
    code, made = whole()
    assert (code, len(made["nodes"]), len(made["left_out"])) == (1, 12, 1)
    assert "CSV files and plots" in capsys.readouterr().out


def test_without_matplotlib_there_are_no_plots(whole, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, made = whole()
    assert (code, len(made["nodes"]), made["left_out"]) == (0, 12, [])
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results-nodes.csv", "results.json"]


def test_the_result_file_alone(whole, tmp_path):
    assert whole("--no-plots")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_launches_are_compiled_before_they_are_needed(tmp_path):
    program = (
        "from measure import ahead;"
        "work = [('norm+relu', 'training forward', 'bfloat16', 'channels_last', shape)"
        " for shape in ((4, 64, 8, 8), (8, 64, 8, 8), (4, 'wide', 8, 8))];"
        "print(len(found := ahead._compile(work, {'L2_BYTES': 2**20}, 'sm_90')), *found)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
    assert said.startswith("1 norm+relu, training forward, bfloat16 channels_last: TypeError")
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == {"_statistics_kernel", "_normalise_kernel"}
