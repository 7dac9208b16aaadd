"""What ``fuse_`` finds in a module's code, what it leaves alone and why, and that no number changes."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from parts import (
    ACTIVATIONS,
    ADD,
    ADD_NORM,
    ADDITIONS,
    ALONE,
    CHANNELS,
    RELU,
    Parts,
    conv,
    forms,
    fused_like_plain,
    norm,
    step,
)
from resfused.kernels.activation import IDENTITY
from resfused.kernels.activation import RELU as RELU_ITSELF
from torch import nn

import resfused
from resfused import norms
from resfused.conversion.fused_forward import FusedForward


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_way_to_write_a_relu(name, device):
    report = fused_like_plain(Parts(ACTIVATIONS[name]), device)
    assert forms(report) == [RELU]
    assert report.norms == ("bn1",)


@pytest.mark.parametrize("name", ADDITIONS)
def test_every_way_to_write_an_addition(name, device):
    form, code = ADDITIONS[name]
    assert forms(fused_like_plain(Parts(code), device)) == [form]


class Own(nn.Module):
    """A ReLU, or nothing, written as a module."""

    def __init__(self, nothing=False):
        super().__init__()
        self.nothing = nothing

    def forward(self, x):
        return x if self.nothing else F.relu(x)


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return x * 0.5 if self.training else x


class Nested(nn.Module):
    """The norms lie in modules inside modules, the addition and the ReLU outside."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(conv(), norm(), nn.ReLU()), conv(), nn.Sequential(norm(), nn.Identity())
        )
        self.shortcut = nn.Sequential(nn.Identity(), conv(), norm())
        self.activation = Own()

    def forward(self, x):
        return self.activation(self.body(x) + self.shortcut(x))


def test_norms_inside_submodules(device):
    report = fused_like_plain(Nested(), device)
    assert [(e.module, e.form, e.norms) for e in report.fused] == [
        ("", ADD_NORM, ("body.2.0", "shortcut.2")), ("body.0", RELU, ("body.0.1",))
    ]  # fmt: skip


def test_flat_sequential(device):
    report = fused_like_plain(
        nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), Own(nothing=True), Own()), device
    )
    assert forms(report) == [RELU, RELU]


def test_norms_in_a_list(device):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([conv(), conv()])
            self.norms = nn.ModuleList([norm(), norm()])

        def forward(self, x):
            for convolution, each in zip(self.convs, self.norms, strict=True):
                x = F.relu(each(convolution(x)))
            return x

    assert fused_like_plain(Listed(), device).norms == ("norms.0", "norms.1")


def test_code_that_differs_in_training(device):
    model = nn.Sequential(conv(), norm(), OnlyInTraining(), nn.ReLU())
    report = fused_like_plain(model, device)
    assert [(e.form, e.in_training, e.in_evaluation) for e in report.fused] == [
        (ALONE, True, False),
        (RELU, False, True),
    ]
    assert report.passes_saved == 0
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for training in (True, False):
        with mock.patch.object(norms, "normalise_add_activate", wraps=norms.normalise_add_activate) as counted:
            model.train(training)(x)
        (call,) = counted.call_args_list
        assert call.args[4] == (IDENTITY if training else RELU_ITSELF)


class FunctionalNorm(nn.BatchNorm2d):
    """As several libraries write a norm with an activation."""

    def __init__(self, act=True):
        super().__init__(CHANNELS)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, eps=self.eps
        )
        return self.act(x)


def test_functional_norms(device):
    class Block(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.conv1, self.norm1, self.conv2, self.norm2 = conv(), FunctionalNorm(), conv(), FunctionalNorm(act=False)
            self.second = second

        def forward(self, x):
            out = self.norm2(self.conv2(self.norm1(self.conv1(x))))
            out += x if self.second is None else self.second(x)
            return F.relu(out)

    model = nn.Sequential(Block(None), Block(nn.Sequential(conv(), FunctionalNorm(act=False))))
    assert forms(fused_like_plain(model, device)) == [ADD, RELU, ADD_NORM, RELU]


def test_functional_norm_with_changed_momentum(device):
    """A number that the code read as a constant: the generated code gives way when it changes."""
    model = nn.Sequential(conv(), FunctionalNorm()).to(device, torch.float64)
    plain = copy.deepcopy(model)
    resfused.fuse_(model)
    model[1].momentum = plain[1].momentum = 0.7
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    actual, expected = step(model, x), step(plain, x)
    assert relative_error(actual["1.running_var"], expected["1.running_var"]) < 1e-12


@pytest.mark.parametrize("kind", ["bn1", "relu"])
def test_hooks_present_before(kind, device):
    model = Parts(ACTIVATIONS["nn.ReLU"])
    calls = []
    getattr(model, kind).register_forward_hook(lambda *arguments: calls.append(arguments))
    report = fused_like_plain(model, device)
    assert forms(report) == ([] if kind == "bn1" else [ALONE])
    assert kind == "relu" or report.left[0].reason == "a hook is on it"
    assert calls


def test_arguments_with_defaults(device):
    """The default is what the code was traced with; another value is computed by the module's own code."""

    def code(self, x, scale=None):
        out = F.relu(self.a(x))
        return out if scale is None else out * scale

    model = Parts(code).to(device, torch.float64)
    plain = copy.deepcopy(model)
    assert forms(resfused.fuse_(model)) == [RELU]
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for arguments, named in (((x,), {}), ((), {"x": x}), ((x, 3.0), {}), ((x,), {"scale": 3.0})):
        assert relative_error(model(*arguments, **named), plain(*arguments, **named)) < 1e-12


def test_addition_in_place_keeps_its_dtype(device):
    """out += x rounds the sum to out's dtype, where out + x has the wider one."""

    def narrow(self, x):
        out = self.bn1(x.bfloat16())
        out += x
        return self.relu(out)

    def wide(self, x):
        return self.relu(self.bn1(x.bfloat16()) + x)

    for code, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        model = Parts(code).to(device)
        plain = copy.deepcopy(model)
        x = torch.randn(2, CHANNELS, 4, 4, device=device)
        assert forms(resfused.fuse_(model)) == [ADD]
        assert model(x).dtype is plain(x).dtype is dtype
        assert relative_error(model(x), plain(x)) < 0.01


def test_filter(device):
    model = Parts(ADDITIONS["two norms"][1]).to(device, torch.float64)
    plain = copy.deepcopy(model)
    report = resfused.fuse_(model, lambda module, name: isinstance(module, nn.BatchNorm2d) and name != "bn2")
    assert [(e.form, e.norms) for e in report.fused] == [(ADD, ("bn1",))]
    assert [(e.norm, e.reason) for e in report.left] == [("bn2", "filter_fn refuses it")]
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    assert relative_error(model(x), plain(x)) < 1e-12


def test_wrong_arguments_change_nothing():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but got dict"):
        resfused.fuse_({})
    with pytest.raises(TypeError, match="model must be"):
        resfused.unfuse_(None)
    model = Parts(ACTIVATIONS["nn.ReLU"])
    with pytest.raises(TypeError, match="filter_fn must be callable or None, but got str"):
        resfused.fuse_(model, "bn1")
    in_place = Parts(ACTIVATIONS["F.relu"])
    in_place.compile(backend="eager")
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(Parts(ACTIVATIONS["F.relu"]))), in_place):
        with pytest.raises(ValueError, match="compiled"):
            resfused.fuse_(compiled)
    assert "forward" not in model.__dict__


def test_a_filter_that_raises_changes_nothing():
    model = Parts(ACTIVATIONS["nn.ReLU"])
    resfused.fuse_(model)
    before = model.__dict__["forward"]

    def refuse(module, name):
        raise LookupError(name)

    with pytest.raises(LookupError, match="bn1"):
        resfused.fuse_(model, refuse)
    assert model.__dict__["forward"] is before


def test_unfuse_restores_exactly():
    model = nn.Sequential(Parts(ADDITIONS["out + x"][1]), Nested())
    before = [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
    first = resfused.fuse_(model)
    assert any(isinstance(m.__dict__.get("forward"), FusedForward) for m in model.modules())
    assert resfused.fuse_(model) == first
    resfused.unfuse_(model)
    assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before


def test_nothing_to_fuse():
    report = resfused.fuse_(nn.Linear(3, 3))
    assert report == resfused.Report((), ())
    assert "0 of 0 norms fused" in str(report)


def test_report_counts_norms(device):
    """Two in one place are two."""
    report = fused_like_plain(Parts(ADDITIONS["two norms"][1]), device)
    assert str(report).startswith("2 of 2 norms fused in 1 place\n     1 norm+add(norm)+relu")


def test_report_counts_pairs(device):
    """Blocks of a chain hand on pairs; the last has nobody to hand one to."""
    model = nn.Sequential(*(Parts(ADDITIONS["out + x"][1]) for _ in range(3)))
    report = fused_like_plain(model, device)
    assert [entry.forked for entry in report.fused] == [True, True, False]
    # In half precision: 16 passes of eager PyTorch, 3 more for two uses, against 10 and two masks of 1/16, 1 more.
    assert report.passes_saved == 3 * (16 - 10.125) + 2 * (3 - 1)
    assert str(report).startswith("3 of 6 norms fused in 3 places\n     3 norm+add+relu")
