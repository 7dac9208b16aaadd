"""What a fused model does once parts of it are others; ``fuse_`` again, of a part, undone."""

import copy
import functools
from types import MethodType
from unittest import mock

import pytest
import torch
from oracle import assert_close, relative_error
from small_networks import (
    BasicBlock,
    ResNet,
    activations,
    chain,
    fused_and_eager,
    images,
    is_fused,
    kernels,
    nodes,
    step,
)
from torch import nn

import resfused

REPLACEMENTS = {
    "another activation": lambda m: setattr(m.layer1[0], "relu", nn.SiLU()),
    "another norm": lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(2, 4)),
    "no norm": lambda m: setattr(m.layer2[0], "bn2", nn.Identity()),
    "no shortcut": lambda m: setattr(m.layer2[0].downsample, "1", nn.Identity()),
    "a block appended": lambda m: m.layer2.append(nn.Sigmoid()),
    "a block in front": lambda m: m.layer1.insert(0, nn.Tanh()),
    "a block taken away": lambda m: m.layer1.__delitem__(0),
    "another block": lambda m: m.layer2.__setitem__(0, nn.Conv2d(4, 6, 1)),
    "another convolution": lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(4, 4, 1, bias=False)),
    "other numbers": lambda m: (setattr(m.layer1[0].bn1, "eps", 0.5), setattr(m.layer1[0].bn2, "momentum", None)),
    "no running statistics": lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(4, track_running_stats=False)),
    "no parameters": lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(4, affine=False)),
    "another stage": lambda m: setattr(m, "layer2", nn.Flatten()),
}


class NormFirst(nn.Module):
    """A norm of what another branch reads after it."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        out = self.bn(x)
        return torch.relu(out + self.conv(x))


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_after_fuse(name, device):
    """The model computes what the unfused one with the same change computes."""
    fused, eager = fused_and_eager(chain(), device)
    for model in (fused, eager):
        torch.manual_seed(1)
        REPLACEMENTS[name](model)
        model.to(device, torch.float64)
    x = activations(device)
    assert_close(step(fused, x), step(eager, x), 1e-9)


class Keeps(nn.Module):
    """Shows its input to others."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        self.kept = x
        return self.module(x)


@pytest.mark.parametrize("place", ["layer2.0", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.downsample"])
def test_replaced_by_what_keeps_its_input(place, device):
    """It is given a tensor with the whole gradient, not one half of a pair."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    gradients = []
    for model in (fused, eager):
        keeps = Keeps(model.get_submodule(place))
        model.set_submodule(place, keeps)
        gradients += torch.autograd.grad(model(x).square().sum(), keeps.kept)
    assert relative_error(*gradients) < 1e-9


class AddsToBranch(NormFirst):
    def forward(self, x):
        out = self.conv(x)
        out += self.bn(x)
        return torch.relu(out)


@pytest.mark.parametrize(("kind", "replacement"), [(NormFirst, nn.ReLU(inplace=True)), (AddsToBranch, nn.Identity())])
@pytest.mark.parametrize("how", ["module", "hook"])
def test_replaced_by_what_lets_the_input_change(kind, replacement, how, device):
    """Where the convolution was taken for one that leaves its input alone, and whose output is its own."""
    fused, eager = fused_and_eager(kind().eval(), device)
    given = [activations(device)]
    given.append(given[0].clone())
    with torch.no_grad():
        assert relative_error(fused(given[0]), eager(given[1])) < 1e-12
        for model in (fused, eager):
            if how == "module":
                model.conv = replacement
            else:
                model.conv.register_forward_hook(lambda m, inputs, y: replacement(inputs[0]))
        assert relative_error(fused(given[0]), eager(given[1])) < 1e-12
    assert torch.equal(*given)


def test_another_head(device):
    fused, eager = fused_and_eager(ResNet(), device)
    for model in (fused, eager):
        torch.manual_seed(1)
        model.fc = nn.Linear(8, 3).to(device, torch.float64)
    x = images(device)
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
        assert_close(step(fused, x), step(eager, x), 1e-9)
    assert counted.call_count == 11


def test_twice_is_once_and_unfuse_restores(device):
    fused, eager = fused_and_eager(ResNet(), device)
    first = {name: m.__dict__["forward"].plans for name, m in fused.named_modules() if "forward" in m.__dict__}
    resfused.fuse_(fused)
    second = {name: m.__dict__["forward"].plans for name, m in fused.named_modules() if "forward" in m.__dict__}
    assert first == second
    assert is_fused(fused)
    resfused.unfuse_(fused)
    for (name, module), (_, plain) in zip(fused.named_modules(), eager.named_modules(), strict=True):
        assert module.__dict__.keys() == plain.__dict__.keys(), name
        assert type(module) is type(plain)
        assert module.forward.__func__ is type(plain).forward
    x = images(device)
    assert_close(step(fused, x), step(eager, x), 1e-12)


def test_part_of_a_model(device):
    """fuse_ of a stage, unfuse_ of one block, and norms that filter_fn refuses."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    resfused.unfuse_(fused)
    resfused.fuse_(fused.layer1)
    assert nodes(fused, x) == 2
    resfused.fuse_(fused)
    resfused.unfuse_(fused.layer2[0])
    assert nodes(fused, x) == 2
    assert_close(step(fused, x), step(eager, x), 1e-9)
    report = resfused.fuse_(fused, lambda module, name: name != "layer1.0.bn2")
    assert [entry.norm for entry in report.left] == ["layer1.0.bn2"]
    assert nodes(fused, x) == 3
    assert_close(step(fused, x), step(eager, x), 1e-9)


def test_a_subclass_that_calls_its_base(device):

    class Scaled(BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    fused, eager = fused_and_eager(nn.Sequential(BasicBlock(4, 4), Scaled(4, 4)), device)
    x = activations(device)
    assert nodes(fused, x) == 4
    assert_close(step(fused, x), step(eager, x), 1e-9)


def test_a_forward_that_is_wrapped_and_bound_again(device):
    """As accelerate does for mixed precision: a copy runs its own, and unfuse_ leaves what is not of fuse_."""
    fused, eager = fused_and_eager(ResNet(), device)
    for model in (fused, eager):
        plain = model.forward.__func__

        @functools.wraps(plain)
        def doubled(module, *args, plain=plain):
            return 2 * plain(module, *args)

        model.forward = MethodType(doubled, model)
    x = images(device)
    assert nodes(fused, x) == 11
    assert_close(step(fused, x), step(eager, x), 1e-9)
    twins = [copy.deepcopy(model) for model in (fused, eager)]
    for twin in twins:
        torch.manual_seed(1)
        nn.init.normal_(twin.fc.weight)
        nn.init.normal_(twin.bn1.weight)
    assert_close(*(step(twin, x) for twin in twins), 1e-9)
    resfused.unfuse_(fused)
    assert nodes(fused, x) == 0
    assert "fused" not in repr(fused)
    assert_close(step(fused, x), step(eager, x), 1e-12)
