"""The benchmark command as a user runs it, and its gate."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from nodes import FORMS

ROOT = Path(__file__).parent.parent
KINDS = ("speedup", "bandwidth", "kernels")


@pytest.mark.interpreter
def test_the_command_without_arguments(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "these times say nothing about speed" in result.stdout
    assert "WRONG" not in result.stdout
    assert "norm+add(norm)+relu" in result.stdout
    path = tmp_path / "results" / "cpu.json"
    (content,) = json.loads(path.read_text())["runs"]
    assert content["environment"]["torch"] == torch.__version__
    assert content["left_out"] == []
    assert {verdict["passed"] for verdict in content["gate"]} == {True}
    assert {(t["form"], t["phase"], t["variant"]) for t in content["nodes"]} == set(
        product(FORMS, ("forward", "backward", "both"), ("resfused", "eager"))
    )
    assert [t["variant"] for t in content["networks"]] == ["resfused", "eager"]
    assert len(content["kernels"]) == 4 * len(FORMS)
    plots = {p.name for p in path.parent.glob("*.png")}
    assert plots == {"cpu-images.png", *(f"cpu-{kind}-bfloat16-channels_last-batch-8.png" for kind in KINDS)}


def test_a_wrong_kernel_fails_the_gate(device, monkeypatch):
    """Half of dz lost: the gate must see it, in every precision it is run in."""
    import gate
    from problems import problem
    from resfused.kernels import gpu as kernels

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
