"""The benchmark command as a user runs it, and its timing and result files on small nodes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.interpreter
def test_the_command_without_arguments(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--output", str(tmp_path / "results")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "No CUDA GPU" in result.stdout
    assert "WRONG" not in result.stdout
    assert "norm+add(norm)+relu" in result.stdout
    assert not (tmp_path / "results").exists()


def test_a_wrong_kernel_fails_the_gate(device, monkeypatch):
    """Half of dz lost: the gate must see it, in every precision it is run in."""
    import gate
    from problems import problem

    from resfused.backend import kernels

    backward = kernels.backward

    def halved(*args):
        gradients = backward(*args)
        return gradients._replace(residual=None if gradients.residual is None else gradients.residual / 2)

    for dtype in (torch.float64, torch.bfloat16):
        p = problem("norm+add+relu", (2, 8, 4, 4), dtype, "contiguous", device)
        assert gate.judge(p, "contiguous").passed
        with monkeypatch.context() as m:
            m.setattr(kernels, "backward", halved)
            verdict = gate.judge(p, "contiguous")
        assert not verdict.passed
        assert verdict.worst == "gradient 1"


def test_timing_and_result_files(device, tmp_path):
    import gate
    import node_timing
    import results
    import timing
    from nodes import FORMS, Node
    from problems import problem
    from rich.console import Console

    nodes = [Node(form, 8, 3, 3, 1) for form in FORMS]
    timings = node_timing.time_nodes(
        nodes,
        [2],
        torch.float32,
        "channels_last",
        device,
        node_timing.libraries(compiled=False),
        3,
        Console(quiet=True),
    )
    assert len(timings) == len(FORMS) * len(node_timing.PHASES)
    assert all(len(s) == 3 and min(s) > 0 for t in timings for s in t.samples.values())
    forward = next(t for t in timings if t.node.form == "norm+add+relu" and t.phase == "forward")
    # x twice, s, y in float32, and a bit an element.
    assert forward.least_bytes == 2 * 72 * (4 * 4 + 1 / 8)
    copy = timing.copy_bandwidth(device, repetitions=3)
    Console(quiet=True).print(node_timing.table(timings, copy))
    verdict = gate.judge(problem(FORMS[0], (2, 8, 3, 3), torch.float32, "contiguous", device), "contiguous")
    json_path, csv_path = results.write(tmp_path, {"batch": [2]}, [verdict], timings, copy)
    content = json.loads(json_path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["gate"][0]["passed"]
    rows = list(csv.DictReader(csv_path.open()))
    assert len(rows) == len(timings) * 2
    assert {row["variant"] for row in rows} == {"resfused", "eager"}
