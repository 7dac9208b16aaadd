"""The benchmark command without a GPU as a user runs it, and its gates."""

import json
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from count.recorder import record
from measure import measuring, memory, standard
from measure.node_timing import SMALL
from record.results import NetworkTime, NodeTime, load
from rich.console import Console
from workloads import gate
from workloads.gate import EVAL, MODES, ONE_LAUNCH, Case
from workloads.nodes import FORMS
from workloads.passes import PHASES
from workloads.problems import DTYPES, LAYOUTS, problem

import resfused
from resfused import backend, reference

ROOT = Path(__file__).parents[2]


def command(folder, *options, **environment):
    """The command of a user who has set nothing else."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RESFUSED_BACKEND", "CXX")}
    line = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *options]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=kept | environment)


@pytest.mark.interpreter
def test_the_command_without_a_command(tmp_path):
    done = command(tmp_path, "--small", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "WRONG" not in done.stdout
    assert "Left out" not in done.stdout
    (path,) = (tmp_path / "results").glob("*.json")
    assert path.stem.endswith("-1-threads")
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["environment"]["threads"], run["environment"]["torch"]) == (1, torch.__version__)
    assert [v["passed"] for v in run["gate"]] == [True] * 96
    assert [v["passed"] for v in run["gate_interpreted"]] == [True] * 15
    (results,) = load([path]).values()
    nodes = results.of(NodeTime)
    assert {(t.form, t.dtype, t.layout, t.phase, t.variant) for t in nodes} == set(
        product((n.form for n in SMALL), ("float32", "bfloat16"), LAYOUTS, PHASES,
                ("resfused", "resfused again", "eager"))
    )  # fmt: skip
    assert not any(t.kept_mapped for t in nodes)
    assert {(t.network, t.dtype) for t in results.of(NetworkTime)} == {("small/cifar_resnet8", "float32")}
    assert "Goals on a CPU, two threads" in done.stdout
    for written in path.parent.glob("*.png"):
        assert written.read_bytes().startswith(b"\x89PNG")


def test_without_a_compiler_nothing_is_timed_in_its_name(tmp_path):
    """Plain operators would give right numbers."""
    done = command(tmp_path, "--small", "--device", "cpu", CXX="no-such-compiler", RESFUSED_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "nothing was timed" in done.stdout
    assert "no C++ compiler was found: no-such-compiler" in " ".join(done.stdout.split())
    (path,) = (tmp_path / "results").glob("*.json")
    (run,) = json.loads(path.read_text())["runs"]
    assert not any(run[kind] for kind in ("nodes", "networks"))


def test_memory_is_kept_mapped(tmp_path):
    """In a process of its own, which it is for good; pages may be larger than a GPU's owner would think."""
    code = (
        "from measure.memory import keep_mapped, page_faults; before = page_faults();"
        "print(keep_mapped(), before, page_faults())"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    kept, before, after = done.stdout.split()
    assert kept == "True", done.stderr
    assert int(after) < 8 < int(before)
    assert memory.MEMORIES == ("default", "kept")


def test_short_cases_cover():
    axes = (FORMS, MODES, LAYOUTS, DTYPES.values(), gate.SMALL_SHAPES)
    cases = [(c.form, c.mode, c.layout, c.dtype, c.shape) for c in gate.short_cases()]
    assert len(set(cases)) == len(cases) == 15
    for one, other in combinations(range(len(axes)), 2):
        pairs = {(case[one], case[other]) for case in cases}
        # Some mode misses some dtype.
        assert len(pairs) >= len(axes[one]) * len(axes[other]) - (2 if (one, other) == (1, 3) else 0)


@pytest.mark.interpreter
def test_the_gate_launches_as_its_cases_say(device):
    for mode, launches in ((EVAL, 1), (gate.TRAINING, 4), (ONE_LAUNCH, 2)):
        with record() as launched:
            (verdict,) = gate.run_gate(
                device, [Case(FORMS[0], "contiguous", torch.float32, mode, (2, 8, 2, 2))], Console(quiet=True), "ours"
            )
        assert len(launched) == launches
        assert (verdict.mode, verdict.passed) == (mode, True)


@pytest.fixture(params=["triton", "native"])
def halved(request, monkeypatch):
    """A backward that loses half of dz, of the kernels that then run."""
    if request.param == "native" and torch.cuda.is_available():
        pytest.skip("about a CPU's kernels, and the device is a GPU")
    kernels = backend.load_kernels() if request.param == "triton" else backend.cpu
    backward = kernels.backward

    def wrong(*args):
        gradients = backward(*args)
        return gradients._replace(residual=None if gradients.residual is None else gradients.residual / 2)

    def halve():
        monkeypatch.setattr(kernels, "backward", wrong)

    with resfused.use_backend(request.param):
        yield halve


def test_a_wrong_kernel_fails_the_gate(device, halved):
    """The gate must see it, in every precision it is run in."""
    p = {dtype: problem("norm+add+relu", (2, 8, 4, 4), dtype, "contiguous", device) for dtype in DTYPES.values()}
    assert all(gate.judge(each, "contiguous").passed for each in p.values())
    halved()
    for each in p.values():
        verdict = gate.judge(each, "contiguous")
        assert not verdict.passed
        assert verdict.worst == "gradient 1"


def test_a_sign_that_rounding_decides_is_nobodys_error():
    p = problem("norm+add+relu", (4, 8, 4, 4), torch.float32, "contiguous", torch.device("cpu"))
    x, residual = (t.detach() for t in p.activations)
    z = F.batch_norm(x, None, None, *(t.detach() for t in p.parameters), True) + residual
    residual[1, 2, 3, 0] -= z[1, 2, 3, 0]

    def moved_by(distance):
        def batch_norm_add_relu(x, residual, mean, var, weight, bias, training):
            return reference.batch_norm_add_relu(x, residual, mean, var, weight, bias + distance, training)

        return SimpleNamespace(batch_norm_add_relu=batch_norm_add_relu)

    judge = gate.Judge(p)
    for distance in (-2e-6, 2e-6):
        assert judge.verdict("contiguous", moved_by(distance)).error < 1e-5
    assert p.dy[1, 2, 3, 0] == 0
    assert (p.dy == 0).sum() < 3


@pytest.mark.parametrize("halved", ["native"], indirect=True)
def test_a_failed_gate_ends_the_run(tmp_path, monkeypatch, capsys, halved):
    import run

    halved()
    case = Case("norm+add+relu", "contiguous", torch.float32, gate.TRAINING, (2, 8, 4, 4))
    monkeypatch.setattr(standard, "every_case", lambda dtypes: [case])
    monkeypatch.setattr(measuring, "copy_bandwidth", lambda device: 1.0)
    with patch.object(standard, "interpreted") as other:
        assert run.main(["--device", "cpu", "--results", str(tmp_path / "cpu.json")]) == 1
    said = capsys.readouterr().out
    assert "WRONG: norm+add+relu, float32 contiguous, 2x8x4x4, training: gradient 1" in said
    assert "nothing was timed" in said
    assert not other.called
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.json"]
