"""``warm_up``: afterwards a step compiles nothing, and the model is as it was."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_networks import ResNet, images, state
from stubbed import results_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resfused


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What warming_cases.py prints."""
    return results_of(Path(__file__).parent / "warming_cases.py", tmp_path_factory)


@pytest.mark.interpreter
class TestCompiled:
    def test_all_is_compiled_and_nothing_launched_but_what_is_others(self, found):
        """Once in training and once in evaluation is the kernel launched that is not the library's."""
        said, launched, compiled = found["warm_up"]
        assert said == compiled > 4
        assert (launched, found["others"]) == (2, 1)

    @pytest.mark.parametrize("call", ["step", "evaluation"])
    def test_nothing_is_left_to_compile(self, found, call):
        _, launched, compiled = found[call]
        assert compiled == 0 < launched

    def test_the_model_is_as_it_was(self, found):
        assert found["as it was"] == [True, True, True, ["norm"]]

    def test_threads_compile(self, found):
        assert found["threads"] >= min(2, os.cpu_count())

    def test_what_is_compiled_is_launched(self, found):
        said, launched, compiled = found["again"]
        assert said == compiled == 0 < launched

    def test_what_differs_is_compiled(self, found):
        """In evaluation, a kernel for each place."""
        assert found["another dtype"] == [2, 0, 2]


def test_on_a_cpu_kernels_run(in_cpp):
    model = ResNet().train()
    resfused.fuse_(model)
    with mock.patch.object(resfused.kernels.cpu, "forward", wraps=resfused.kernels.cpu.forward) as forward:
        before = state(model)
        assert resfused.warm_up(model, images(torch.device("cpu"), torch.float32)) == 0
    assert forward.call_count == 2 * 11
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def wrapped():
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(model)
    return nn.Sequential(model)


class Silent(nn.Module):
    """Its output says nothing of its parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return {"logits": self.conv(x).detach()}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: ResNet().state_dict(), TypeError, "model must be a torch.nn.Module, but got OrderedDict"),
        (lambda: torch.compile(ResNet()), ValueError, "not be compiled yet, but it is: call warm_up first"),
        (wrapped, ValueError, r"but its submodule 0 is one: .* its \.module"),
        (Silent, ValueError, "with gradients in training, but returned dict without any"),
    ],
    ids=["no module", "compiled", "parallel", "no gradients"],
)
def test_what_cannot_be_warmed_up(model, error, message):
    with pytest.raises(error, match=message):
        resfused.warm_up(model(), torch.ones(2, 3, 8, 8))
