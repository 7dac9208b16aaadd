"""What ``fuse_`` leaves alone, and why; that no number changes where it does not."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from parts import ACTIVATIONS, ADD, ADD_NORM, ALONE, CHANNELS, SUM, Parts, conv, forms, fused_like_plain, norm
from torch import nn
from torch.utils.checkpoint import checkpoint

import resfused


def in_place_on_input(self, x):
    x += self.a(x.clone())
    return self.relu(x)


def sum_used_twice(self, x):
    z = self.a(x) + x
    return F.relu(z), z.exp()


def norm_used_twice(self, x):
    out = self.a(x)
    return F.relu(out) * out


def addend_used_twice(self, x):
    out = self.a(x)
    return F.relu(out + x) * out


def added_to_itself(self, x):
    out = self.a(x)
    return F.relu(out + out)


def called_twice(self, x):
    return F.relu(self.bn1(self.conv1(F.relu(self.bn1(self.conv2(x))))))


def branches(self, x):
    return F.relu(self.a(x)) if x.sum() > 0 else F.relu(self.a(x)) * 2


def draws(self, x):
    return F.relu(self.a(x)) * (1 if random.random() < 2 else 0)


def draws_a_tensor(self, x):
    return F.relu(self.a(x)) * (1 if torch.rand(1).item() < 2 else 0)


def assigns(self, x):
    self.seen = x.shape
    return F.relu(self.a(x))


def without_gradient(self, x):
    with torch.no_grad():
        out = self.a(x)
    return F.relu(out) + x


def casts(self, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.a(x))


def asks_for_gradients(self, x):
    return F.relu(self.a(x)) if torch.is_grad_enabled() else F.relu(self.a(x)) + 0


def checkpoints(self, x):
    return checkpoint(lambda x: F.relu(self.a(x)), x, use_reentrant=False)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


def has_own_gradient(self, x):
    return Double.apply(F.relu(self.a(x)))


def reads_an_object(self, x):
    return F.relu(self.a(x)) * self.settings.scale


WITHOUT_WHAT_FOLLOWS = {
    "another activation": (lambda self, x: F.elu(self.a(x)), ALONE),
    "scaled addition": (lambda self, x: F.relu(torch.add(self.a(x), x, alpha=2)), ALONE),
    "multiplied": (lambda self, x: F.relu(self.a(x) * x), ALONE),
    "in place on the input": (in_place_on_input, ALONE),
    "sum used twice": (sum_used_twice, SUM),
    "norm used twice": (norm_used_twice, ALONE),
    "addend used twice": (addend_used_twice, ALONE),
    "added to itself": (added_to_itself, ALONE),
    "called twice": (called_twice, ALONE),
}


@pytest.mark.parametrize("name", WITHOUT_WHAT_FOLLOWS)
def test_what_follows_is_left(name, device):
    code, form = WITHOUT_WHAT_FOLLOWS[name]
    model = Parts(code)
    report = fused_like_plain(model, device)
    assert forms(report) == [form]
    check = report.check(model, torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device))
    assert check.places == (1, 1)


LEFT = {
    "given by name": (lambda self, x: F.relu(self.bn1(input=self.conv1(x))), "something else than one tensor"),
    "branch on values": (branches, "cannot be traced"),
    "random number": (draws, "random"),
    "random tensor": (draws_a_tensor, "rand"),
    "assignment": (assigns, "assigns seen"),
    "no_grad": (without_gradient, "grad"),
    "autocast": (casts, "autocast"),
    "is_grad_enabled": (asks_for_gradients, "is_grad_enabled"),
    "checkpoint": (checkpoints, "cannot be traced"),
    "autograd.Function": (has_own_gradient, "autograd.Function"),
}


class Scale(nn.Module):
    """As attention: what it returns is a tensor of its own."""

    def forward(self, x):
        return x * 0.5


class View(nn.Module):
    def forward(self, x):
        return x.view_as(x)


def added_to_a_gate(self, x):
    out = self.conv2(x)
    gated = self.gate(out)
    gated += self.a(x)
    return self.relu(gated), out


@pytest.mark.parametrize(("gate", "expected"), [(Scale, [ADD]), (View, [ALONE])])
def test_addition_in_place_to_what_a_module_returns(gate, expected, device):
    model = Parts(added_to_a_gate)
    model.gate = gate()
    assert forms(fused_like_plain(model, device)) == expected


def test_addition_in_place_to_what_a_watched_module_returns(device):
    """The hook may hold what the addition changes."""
    model = Parts(added_to_a_gate)
    model.gate = Scale()
    model.gate.register_forward_hook(lambda module, args, output: None)
    assert forms(fused_like_plain(model, device)) == [ALONE]


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_the_reason(name, device):
    code, reason = LEFT[name]
    report = fused_like_plain(Parts(code), device)
    assert not report.fused
    reasons = {entry.norm: entry.reason for entry in report.left}
    assert reason in reasons["bn1"], reasons
    assert " ".join(reasons["bn1"].split()) in report.table()


def test_input_changed_before_the_relu(device):
    """The norm may not be moved behind the change of what it reads. Without gradients: eager has none here."""

    def code(self, x):
        out = self.bn1(x)
        x.mul_(2)
        return F.relu(out) + x

    model = Parts(code).to(device, torch.float64)
    plain = copy.deepcopy(model)
    assert forms(resfused.fuse_(model)) == [ALONE]
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), plain(x.clone()), rtol=1e-12, atol=1e-12)


def leaky_between(self, x):
    out = self.bn1(x)
    F.leaky_relu(x, 2.0, inplace=True)
    return F.relu(out) + x


def leaky_after_the_addition(self, x):
    x = x + 1
    out = self.a(x) + x
    F.leaky_relu(x, 2.0, inplace=True)
    return F.relu(out) + x


def doubled_after_the_addition(self, x):
    x = x + 1
    out = self.a(x) + x
    x *= 2
    return F.relu(out) + x


def doubled_between(self, x):
    x = x + 1
    out = self.bn1(x)
    x *= 2
    return F.relu(out + x)


@pytest.mark.parametrize("code", [leaky_between, leaky_after_the_addition, doubled_after_the_addition, doubled_between])
def test_a_change_in_place_between_norm_addition_and_relu(code, device):
    """Of what a fused node would read at the ReLU. Without gradients: eager has none here."""
    model = Parts(code).to(device, torch.float64)
    plain = copy.deepcopy(model)
    resfused.fuse_(model)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    with torch.no_grad():
        assert relative_error(model(x.clone()), plain(x.clone())) < 1e-12


def test_an_identity_used_twice(device):
    def code(self, x):
        out = self.identity(self.a(x))
        return F.relu(out) * out

    model = Parts(code)
    model.identity = nn.Identity()
    assert forms(fused_like_plain(model, device)) == [ALONE]


def frozen_beside_batch(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), functional_norm(self.bn2, self.conv2(x), False)


def broadcast_beside_whole(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), functional_norm(self.bn2, self.conv2(x)[:, :, :1], True)


def module_beside_function(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), self.b(x)


def functional_norm(norm, x, training):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.2, 1e-3)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [(frozen_beside_batch, [ADD_NORM]), (broadcast_beside_whole, [ADD_NORM]), (module_beside_function, [ADD, ALONE])],
)
def test_two_functional_norms_that_differ(norms, expected, device):
    """In their modes, in their shapes, or one is a module: what one node cannot do, PyTorch does."""

    def code(self, x):
        a, b = norms(self, x)
        return F.relu(a + b)

    assert forms(fused_like_plain(Parts(code), device)) == expected


def test_reads_of_objects_are_refused(device):
    model = Parts(reads_an_object)
    model.settings = type("Settings", (), {"scale": 2})()
    assert "settings" in fused_like_plain(model, device).left[0].reason


def test_frozen_graphs_are_left(device):
    traced = torch.fx.symbolic_trace(nn.Sequential(conv(), norm(), nn.ReLU()))
    model = nn.Sequential(traced, conv())
    report = fused_like_plain(model, device)
    assert "GraphModule" in report.left[0].reason
    scripted = torch.jit.script(nn.Sequential(conv(), norm(), nn.ReLU()))
    assert not resfused.fuse_(nn.Sequential(scripted)).fused


def test_own_forward_of_an_instance_is_left(device):
    model = Parts(ACTIVATIONS["nn.ReLU"])
    model.forward = lambda x: x
    assert "forward of its own" in resfused.fuse_(model).left[0].reason
