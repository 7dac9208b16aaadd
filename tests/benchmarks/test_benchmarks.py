"""The benchmark command without a GPU as a user runs it, and its gate."""

import json
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from count.recorder import record
from record.results import PassCount, load
from report import without_gpu
from rich.console import Console
from workloads import gate
from workloads.gate import EVAL, MODES, ONE_LAUNCH, Case
from workloads.nodes import FORMS
from workloads.passes import PHASES, two_phases
from workloads.problems import DTYPES, LAYOUTS, problem

ROOT = Path(__file__).parents[2]


@pytest.mark.interpreter
def test_the_command_without_arguments(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    *_, correct, traffic, speed = result.stdout.splitlines()
    assert correct == "Correct: 72 of 72 cases, compared with PyTorch in float64."
    assert traffic == "Traffic: 1.7 times less than eager around ResNet-50's norms, 2.5 in one launch."
    assert "python benchmarks/run.py" in speed
    assert max(map(len, (correct, traffic, speed))) <= 80
    path = tmp_path / "results" / "cpu.json"
    (content,) = json.loads(path.read_text())["runs"]
    assert content["environment"]["torch"] == torch.__version__
    assert [verdict["passed"] for verdict in content["gate"]] == [True] * 72
    assert not any(content[kind] for kind in ("nodes", "kernels", "networks", "steps", "left_out"))
    (results,) = load([path]).values()
    counts = {(c.what, c.phase, c.variant): c.passes for c in results.of(PassCount)}
    assert len(counts) == 3 * (3 * 3 + 2)
    eager, ours, one_launch = without_gpu.VARIANTS
    for form, phase in product(FORMS, PHASES):
        # What is per channel is on top.
        least = two_phases(form, phase).bytes(1, torch.bfloat16) / 2
        assert least <= counts[form, phase, ours] < least + 0.02
        assert counts[form, phase, one_launch] < counts[form, phase, ours] < counts[form, phase, eager]
    assert counts["ResNet-50", "training step", eager] == pytest.approx(15.33, abs=0.005)
    assert {p.name for p in path.parent.iterdir()} == {"cpu.json", "cpu-passes.png"}
    assert (path.parent / "cpu-passes.png").read_bytes().startswith(b"\x89PNG")


def test_cases_cover_every_pair():
    axes = (FORMS, LAYOUTS, DTYPES.values(), MODES, gate.SMALL_SHAPES)
    cases = gate.covering_cases()
    assert len(set(cases)) == len(cases)
    for one, other in combinations(range(len(axes)), 2):
        assert {(case[one], case[other]) for case in cases} == set(product(axes[one], axes[other]))


@pytest.mark.interpreter
def test_the_gate_launches_as_its_cases_say(device):
    for mode, launches in ((EVAL, 1), (gate.TRAINING, 6), (ONE_LAUNCH, 2)):
        with record() as launched:
            (verdict,) = gate.run_gate(
                device, [Case(FORMS[0], "contiguous", torch.float32, mode, (2, 8, 2, 2))], Console(quiet=True)
            )
        assert len(launched) == launches
        assert (verdict.mode, verdict.passed) == (mode, True)


@pytest.fixture
def halved(monkeypatch):
    """A backward that loses half of dz."""
    from resfused.kernels import gpu as kernels

    backward = kernels.backward

    def wrong(*args):
        gradients = backward(*args)
        return gradients._replace(residual=None if gradients.residual is None else gradients.residual / 2)

    monkeypatch.setattr(kernels, "backward", wrong)


def test_a_wrong_kernel_fails_the_gate(device, monkeypatch, request):
    """The gate must see it, in every precision it is run in."""
    p = {dtype: problem("norm+add+relu", (2, 8, 4, 4), dtype, "contiguous", device) for dtype in DTYPES.values()}
    assert all(gate.judge(each, "contiguous").passed for each in p.values())
    request.getfixturevalue("halved")
    for each in p.values():
        verdict = gate.judge(each, "contiguous")
        assert not verdict.passed
        assert verdict.worst == "gradient 1"


@pytest.mark.interpreter
@pytest.mark.usefixtures("halved")
def test_a_failed_gate_ends_the_run(tmp_path, monkeypatch, capsys):
    import run

    case = Case("norm+add+relu", "contiguous", torch.float32, gate.TRAINING, (2, 8, 4, 4))
    monkeypatch.setattr(without_gpu, "covering_cases", lambda: [case])
    assert run.main(["--results", str(tmp_path / "cpu.json")]) == 1
    said = capsys.readouterr().out
    assert "WRONG: norm+add+relu, float32 contiguous, 2x8x4x4, training: gradient 1" in said
    assert "Correct: 0 of 1 cases" in said
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.json"]
