"""``run.py accuracy``: errors of M2, of which a known one is told as it is."""

import json
from unittest import mock

import pytest
import run
import torch
from count import accuracy


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPE", (4, 3, 8, 8))


def test_a_known_error_is_found(small):
    """A thousandth of M2, of values that are exact in float64; what is not a number is infinitely off."""

    def off(x):
        return ((x.double() - x.double().mean((0, 2, 3), keepdim=True)) ** 2).sum((0, 2, 3)) * 1.001

    assert accuracy.errors(off) == pytest.approx([1e-3] * len(accuracy.CASES), rel=1e-6)
    assert accuracy.errors(lambda x: off(x) * float("nan")) == [float("inf")] * len(accuracy.CASES)


def test_the_command(small, monkeypatch, in_cpp, tmp_path, capsys):
    """Every implementation on its own kernels, each of them near float64."""
    # These kernels are interpreted here already.
    monkeypatch.setattr(accuracy, "interpreted", lambda work: work())
    kernels = accuracy.backend.load_kernels()
    calls = [
        mock.patch.object(owner, "local_statistics", wraps=owner.local_statistics) for owner in (kernels, accuracy.cpu)
    ]
    with calls[0] as triton, calls[1] as native:
        assert run.main(["accuracy", "--json", str(tmp_path / "errors.json")]) == 0
    assert triton.call_count == native.call_count == len(accuracy.CASES)
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "errors.json").read_text())
    assert [(row["mean/std"], row["layout"]) for row in rows] == list(accuracy.CASES)
    for row in rows:
        for name in (accuracy.EAGER, accuracy.NATIVE, accuracy.INTERPRETED):
            assert 0 < row[name] < 1e-6 + 2 * row["mean/std"] * 2**-24
            assert f"{row[name]:.1e}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert torch.cuda.is_available() == (accuracy.ON_GPU in rows[0])
