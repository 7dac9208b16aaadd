"""What ``fuse_`` finds in a module's code, what it leaves alone and why, and that no number changes."""

import copy
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from resfused.kernels import gpu as kernels
from torch import nn
from torch.utils.checkpoint import checkpoint

import resfused
from resfused.conversion.fused_forward import FusedForward

CHANNELS = 4
RELU, ADD, ADD_NORM = "norm+relu", "norm+add+relu", "norm+add(norm)+relu"


def conv():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)


def norm():
    return nn.BatchNorm2d(CHANNELS)


class Parts(nn.Module):
    """Two convolutions with norms, and a ReLU, for the code that each test writes."""

    def __init__(self, code=None, relu=None):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), norm(), conv(), norm()
        self.relu = relu or nn.ReLU(inplace=True)
        if code is not None:
            self.__class__ = type(self.__class__.__name__, (self.__class__,), {"forward": code})

    def a(self, x):
        return self.bn1(self.conv1(x))

    def b(self, x):
        return self.bn2(self.conv2(x))


def step(model, x, training=True):
    """Everything that one call leaves behind: output, gradients, buffers, and what became of the caller's tensor."""
    model.train(training).zero_grad()
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    y = model(given)
    results = {"given": given.detach().clone()}
    for i, part in enumerate(y if isinstance(y, tuple) else (y,)):
        results[f"output {i}"] = part.detach().clone()
    sum((part * torch.linspace(-1, 2, part.numel(), dtype=part.dtype, device=part.device).view_as(part)).sum()
        for part in (y if isinstance(y, tuple) else (y,))).backward()  # fmt: skip
    results["input"] = leaf.grad
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def fused_like_plain(model, device, shape=(3, CHANNELS, 4, 5), tolerance=1e-9):
    """Fuses the model, whose numbers must stay those of a copy that was not; the report."""
    torch.manual_seed(1)
    model = model.to(device, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    plain = copy.deepcopy(model)
    report = resfused.fuse_(model)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    for training in (True, False):
        actual, expected = step(model, x, training), step(plain, x, training)
        assert actual.keys() == expected.keys()
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) < tolerance, errors
    return report


def forms(report):
    return [entry.form for entry in report.fused]


ACTIVATIONS = {
    "nn.ReLU": lambda self, x: self.relu(self.a(x)),
    "F.relu": lambda self, x: F.relu(self.a(x)),
    "F.relu in place": lambda self, x: F.relu(self.a(x), inplace=True),
    "F.relu_": lambda self, x: F.relu_(self.a(x)),
    "torch.relu": lambda self, x: torch.relu(self.a(x)),
    "torch.relu_": lambda self, x: torch.relu_(self.a(x)),
    "Tensor.relu": lambda self, x: self.a(x).relu(),
    "Tensor.relu_": lambda self, x: self.a(x).relu_(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_way_to_write_a_relu(name, device):
    report = fused_like_plain(Parts(ACTIVATIONS[name]), device)
    assert forms(report) == [RELU]
    assert report.norms == ("bn1",)


def add_in_place(self, x):
    out = self.a(x)
    out += x
    return self.relu(out)


def add_to_fresh(self, x):
    shortcut = self.conv2(x)
    shortcut += self.a(x)
    return self.relu(shortcut)


ADDITIONS = {
    "out + x": (ADD, lambda self, x: self.relu(self.a(x) + x)),
    "x + out": (ADD, lambda self, x: self.relu(x + self.a(x))),
    "out += x": (ADD, add_in_place),
    "shortcut += out": (ADD, add_to_fresh),
    "torch.add": (ADD, lambda self, x: F.relu(torch.add(self.a(x), x))),
    "Tensor.add": (ADD, lambda self, x: F.relu(self.a(x).add(x))),
    "Tensor.add_": (ADD, lambda self, x: F.relu(self.a(x).add_(x))),
    "two norms": (ADD_NORM, lambda self, x: self.relu(self.a(x) + self.b(x))),
    "two norms, in place": (ADD_NORM, lambda self, x: self.relu(self.a(x).add_(self.b(x)))),
    "a norm of the input": (ADD, lambda self, x: self.relu(self.bn1(x) + x)),
    "broadcast": (ADD, lambda self, x: self.relu(self.a(x) + x.mean((2, 3), keepdim=True))),
    "broadcast, two norms": (ADD_NORM, lambda self, x: self.relu(self.a(x) + self.b(x[:, :, :1]))),
}


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
    assert [(e.form, e.in_training) for e in report.fused] == [(RELU, False)]
    assert report.passes_saved == 0
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for training in (True, False):
        with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
            model.train(training)(x)
        assert counted.call_count == (0 if training else 1)


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


def in_place_on_input(self, x):
    x += self.a(x.clone())
    return self.relu(x)


def sum_used_twice(self, x):
    z = self.a(x) + x
    return F.relu(z), z.exp()


def norm_used_twice(self, x):
    out = self.a(x)
    return F.relu(out) * out


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


LEFT = {
    "another activation": (lambda self, x: F.silu(self.a(x)), "silu"),
    "scaled addition": (lambda self, x: F.relu(torch.add(self.a(x), x, alpha=2)), "add"),
    "multiplied": (lambda self, x: F.relu(self.a(x) * x), "mul"),
    "in place on the input": (in_place_on_input, "in place"),
    "sum used twice": (sum_used_twice, "2 times"),
    "norm used twice": (norm_used_twice, "2 times"),
    "called twice": (called_twice, "2 times"),
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


@pytest.mark.parametrize(("gate", "expected"), [(Scale, [ADD]), (View, [])])
def test_addition_in_place_to_what_a_module_returns(gate, expected, device):
    model = Parts(added_to_a_gate)
    model.gate = gate()
    assert forms(fused_like_plain(model, device)) == expected


def test_addition_in_place_to_what_a_watched_module_returns(device):
    """The hook may hold what the addition changes."""
    model = Parts(added_to_a_gate)
    model.gate = Scale()
    model.gate.register_forward_hook(lambda module, args, output: None)
    assert not forms(fused_like_plain(model, device))


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
    assert "in place" in resfused.fuse_(model).left[0].reason
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), plain(x.clone()))


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
    assert not forms(fused_like_plain(model, device))


def frozen_beside_batch(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), functional_norm(self.bn2, self.conv2(x), False)


def broadcast_beside_whole(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), functional_norm(self.bn2, self.conv2(x)[:, :, :1], True)


def module_beside_function(self, x):
    return functional_norm(self.bn1, self.conv1(x), True), self.b(x)


def functional_norm(norm, x, training):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.2, 1e-3)


@pytest.mark.parametrize(
    ("norms", "form"),
    [(frozen_beside_batch, ADD_NORM), (broadcast_beside_whole, ADD_NORM), (module_beside_function, ADD)],
)
def test_two_functional_norms_that_differ(norms, form, device):
    """In their modes, in their shapes, or one is a module: what one node cannot do, PyTorch does."""

    def code(self, x):
        a, b = norms(self, x)
        return F.relu(a + b)

    assert forms(fused_like_plain(Parts(code), device)) == [form]


class Reads(Parts):
    """Its code reads ``number``."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class ReadsAList(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * self.number[0]


class AsksForTrue(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number is True else 3 if isinstance(self.number, int) else 5)


class AsksForTrueInAList(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number[0] is True else 3 if isinstance(self.number[0], int) else 5)


class AsksForTrueInADict(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number["it"] is True else 3 if isinstance(self.number["it"], int) else 5)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [(AsksForTrue, [True, 1, 1.0]), (AsksForTrueInAList, [[True], [1], [1.0]]),
     (AsksForTrueInADict, [{"it": True}, {"it": 1}, {"it": 1.0}])],
)  # fmt: skip
def test_true_is_not_one(kind, numbers, device):
    """True, 1 and 1.0 are equal, and not the same to code that reads them."""
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for before in numbers:
        model = kind(before).to(device, torch.float64)
        assert forms(resfused.fuse_(model)) == [RELU]
        for after in numbers:
            model.number = after
            assert relative_error(model(x), kind.forward(model, x)) < 1e-12, (before, after)


def test_a_list_changed_in_place(device):
    model = ReadsAList([2.0]).to(device, torch.float64)
    assert forms(resfused.fuse_(model)) == [RELU]
    model.number[0] = 3.0
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    assert relative_error(model(x), ReadsAList.forward(model, x)) < 1e-12


def changes_its_input(self, x):
    out = self.a(x)
    x += out
    return F.relu(self.b(x) + x)


def adds_its_input(self, x):
    out = self.a(x)
    out += x
    return F.relu(out)


@pytest.mark.parametrize("code", [changes_its_input, adds_its_input])
def test_a_pair_is_not_changed_in_place(code, device):
    """Both halves are one memory: a block that changes its input in place is given a tensor, not a pair.

    Of the gradients only those that come before the change: the others are eager's error.
    """
    plain = nn.Sequential(Parts(ADDITIONS["out + x"][1]), Parts(code)).to(device, torch.float64)
    model = copy.deepcopy(plain)
    assert resfused.fuse_(model).fused[0].forked == (code is adds_its_input)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    results = []
    for each in (model, plain):
        last = each[1].bn2 if code is changes_its_input else each[1].bn1
        y = each(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), last.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12


class UsesTwice(nn.Module):
    """The first block's output goes to the second, and elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (Parts(ADDITIONS["out + x"][1]) for _ in range(2))

    def forward(self, x):
        y = self.first(x)
        return self.second(y) * y.sigmoid()


class GivesTwice(UsesTwice):
    def forward(self, x):
        y = self.first(x)
        return y, self.second(y)


@pytest.mark.parametrize("kind", [UsesTwice, GivesTwice])
def test_a_value_used_elsewhere_is_no_pair(kind, device):
    assert not any(entry.forked for entry in fused_like_plain(kind(), device).fused)


def test_reads_of_objects_are_refused(device):
    model = Parts(reads_an_object)
    model.settings = type("Settings", (), {"scale": 2})()
    assert "settings" in fused_like_plain(model, device).left[0].reason


def test_isinstance_answers_for_tensors(device):
    def code(self, x):
        x = x if isinstance(x, torch.Tensor) else x[0] * 100
        return F.relu(self.a(x))

    assert forms(fused_like_plain(Parts(code), device)) == [RELU]


@pytest.mark.parametrize("kind", ["bn1", "relu"])
def test_hooks_present_before(kind, device):
    model = Parts(ACTIVATIONS["nn.ReLU"])
    calls = []
    getattr(model, kind).register_forward_hook(lambda *arguments: calls.append(arguments))
    report = fused_like_plain(model, device)
    assert not report.fused
    assert "hook" in report.left[0].reason
    assert calls


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
