"""Every activation that ``fuse_`` finds behind a norm, every way to write it, and what looks like one and is none."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, relative_error
from parts import ALONE, CHANNELS, SUM, SUM_NORM, Parts, conv, forms, fused_like_plain, norm, step
from resfused.kernels.activation import Activation
from torch import nn

import resfused
from resfused.conversion.matching.activations import computed
from resfused.reference import activate

INPUT = (2, CHANNELS, 4, 4)
SIXTH = 1e-7
"""PyTorch's gradient of hardsigmoid is the sixth of single precision, in double precision too."""
WRITTEN = {
    "relu6": [
        F.relu6,
        lambda z: F.relu6(z, inplace=True),
        lambda z: F.hardtanh(z, 0, 6),
        lambda z: F.hardtanh(z, min_val=0.0, max_val=6.0, inplace=True),
        lambda z: F.hardtanh_(z, 0.0, 6.0),
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        nn.Hardtanh(0, 6),
    ],
    "leaky_relu": [
        F.leaky_relu,
        lambda z: F.leaky_relu(z, 0.2),
        lambda z: F.leaky_relu(z, negative_slope=0.3, inplace=True),
        lambda z: F.leaky_relu_(z, 2),
        nn.LeakyReLU(),
        nn.LeakyReLU(0.2, inplace=True),
    ],
    "silu": [
        F.silu,
        lambda z: F.silu(z, inplace=True),
        lambda z: z * torch.sigmoid(z),
        lambda z: F.sigmoid(z) * z,
        lambda z: torch.mul(z, z.sigmoid()),
        lambda z: z.mul(torch.special.expit(z)),
        lambda z: z.mul_(z.sigmoid()),
        nn.SiLU(),
        nn.SiLU(inplace=True),
    ],
    "hardswish": [F.hardswish, lambda z: F.hardswish(z, inplace=True), nn.Hardswish(), nn.Hardswish(inplace=True)],
    "gelu": [F.gelu, lambda z: F.gelu(z, approximate="none"), nn.GELU()],
    "gelu_tanh": [lambda z: F.gelu(z, approximate="tanh"), nn.GELU("tanh")],
    "sigmoid": [
        torch.sigmoid,
        torch.sigmoid_,
        F.sigmoid,
        torch.special.expit,
        lambda z: z.sigmoid(),
        lambda z: z.sigmoid_(),
        nn.Sigmoid(),
    ],
    "hardsigmoid": [
        F.hardsigmoid,
        lambda z: F.hardsigmoid(z, inplace=True),
        nn.Hardsigmoid(),
        nn.Hardsigmoid(inplace=True),
    ],
}
WAYS = [(name, i) for name, ways in WRITTEN.items() for i in range(len(ways))]
BEFORE = {
    ALONE: lambda self, x: self.a(x),
    SUM: lambda self, x: self.a(x) + x,
    SUM_NORM: lambda self, x: self.a(x) + self.b(x),
}


def activated(act, before=ALONE):
    """A module that ends in ``act``, a function or a module, of what is before it."""
    model = Parts(lambda self, x: self.act(BEFORE[before](self, x)))
    model.act = act
    return model


def tolerance(name):
    return SIXTH if name == "hardsigmoid" else 1e-9


def ran(report, model, device):
    return report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device)).places


@pytest.mark.parametrize(("name", "i"), WAYS)
def test_every_way_to_write_it(name, i, device):
    """Behind a norm, a sum and a sum of two norms in turn."""
    before = list(BEFORE)[i % 3]
    model = activated(WRITTEN[name][i], before)
    report = fused_like_plain(model, device, tolerance=tolerance(name))
    assert forms(report) == [f"{before}+{name}"]
    assert ran(report, model, device) == (1, 1)


MODULES = [(name, way) for name, ways in WRITTEN.items() for way in ways if isinstance(way, nn.Module)]


@pytest.mark.parametrize(("name", "module"), MODULES, ids=lambda value: str(value).replace(" ", ""))
def test_modules_are_what_they_are_taken_for(name, module):
    assert computed(module).name == name
    assert_equal_at_kinks(module, computed(module))


def assert_equal_at_kinks(module, activation, nan=True):
    """In value and gradient, at infinities too."""
    points = [-math.inf, -1e30, -4, -3, -1, -0.0, 0.0, 1, 3, 4, 6, 7, 1e30, math.inf] + [math.nan] * nan
    results = []
    for function in (module, lambda z: activate(z, activation)):
        z = torch.tensor(points, dtype=torch.float64, requires_grad=True)
        y = function(z * 1)
        results.append(torch.stack([y.detach(), *torch.autograd.grad(y.sum(), z)]))
    torch.testing.assert_close(*results, rtol=SIXTH, atol=0, equal_nan=True)


def gate_in_place(self, x):
    z = self.bn1(x)
    return z * z.sigmoid_()


def gate_used_twice(self, x):
    z = self.a(x)
    gate = torch.sigmoid(z)
    return z * gate + gate


def quick_gelu(self, x):
    z = self.a(x)
    return z * torch.sigmoid(1.702 * z)


NONE_OF_THEM = {
    "clamp, whose gradient at 0 and 6 depends on the version": lambda self, x: self.a(x).clamp(0, 6),
    "other limits": lambda self, x: F.hardtanh(self.a(x)),
    "a module of other limits": lambda self, x: self.relu(self.a(x)),
    "quick gelu": quick_gelu,
    "a gate used twice": gate_used_twice,
    "a gate of something else": lambda self, x: self.a(x) * torch.sigmoid(x),
    "mish": lambda self, x: F.mish(self.a(x)),
    "given by name": lambda self, x: torch.sigmoid(input=self.a(x)),
}


@pytest.mark.parametrize("name", NONE_OF_THEM)
def test_what_is_none(name, device):
    """The norm alone is fused."""
    model = Parts(NONE_OF_THEM[name], nn.Hardtanh())
    report = fused_like_plain(model, device)
    assert forms(report) == [ALONE]
    assert ran(report, model, device) == (1, 1)


def test_a_gate_in_place(device):
    """Which changes the other factor. Without gradients: eager has none here."""
    model = Parts(gate_in_place).to(device, torch.float64)
    plain = copy.deepcopy(model)
    assert forms(resfused.fuse_(model)) == [ALONE]
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) < 1e-12


class Swish(nn.Module):
    """As many write it."""

    def forward(self, x):
        return x * torch.sigmoid(x)


def test_a_module_of_ones_own_for_two_norms(device):
    model = Parts(lambda self, x: self.act(self.b(self.act(self.a(x)))))
    model.act = Swish()
    report = fused_like_plain(model, device)
    assert forms(report) == ["norm+silu", "norm+silu"]
    assert ran(report, model, device) == (2, 2)


def test_a_sigmoid_module_of_two_gates(device):
    def code(self, x):
        z = self.a(x)
        z = z * self.act(z)
        z = self.b(z) + x
        return z * self.act(z)

    model = Parts(code)
    model.act = nn.Sigmoid()
    assert forms(fused_like_plain(model, device)) == ["norm+silu", "norm+add+silu"]


def test_modules_of_timm(device):
    activations = pytest.importorskip("timm.layers.activations")
    memory_efficient = pytest.importorskip("timm.layers.activations_me")
    expected = [
        (activations.Swish(), "silu", True),
        (activations.Swish(inplace=True), "silu", True),
        (activations.HardSwish(), "hardswish", False),
        (activations.HardSwish(inplace=True), "hardswish", False),
        (activations.HardSigmoid(), "hardsigmoid", False),
        (activations.Sigmoid(), "sigmoid", True),
        (activations.Sigmoid(inplace=True), "sigmoid", True),
        (activations.GELU(), "gelu", True),
        (activations.GELUTanh(), "gelu_tanh", True),
        (memory_efficient.SwishMe(), "silu", True),
    ]
    for module, name, nan in expected:
        assert_found(module, name, device)
        assert_equal_at_kinks(module, Activation(name), nan)
    for module in (
        activations.HardSigmoid(inplace=True),
        activations.QuickGELU(),
        activations.HardMish(),
        memory_efficient.HardSwishMe(),
        memory_efficient.HardSigmoidMe(),
    ):
        assert forms(fused_like_plain(activated(module), device)) == [ALONE]


def assert_found(module, name, device):
    model = activated(module)
    report = fused_like_plain(model, device, tolerance=tolerance(name))
    assert forms(report) == [f"norm+{name}"], module
    assert ran(report, model, device) == (1, 1)


def test_modules_of_transformers(device):
    of = pytest.importorskip("transformers.activations").ACT2FN
    expected = {
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "hardswish": "hardswish",
        "leaky_relu": "leaky_relu",
        "relu": "relu",
        "relu6": "relu6",
        "sigmoid": "sigmoid",
        "silu": "silu",
        "swish": "silu",
    }
    for key, name in expected.items():
        assert_found(of[key], name, device)
    for key in ("quick_gelu", "relu2", "tanh", "mish"):
        assert forms(fused_like_plain(activated(of[key]), device)) == [ALONE]
    assert forms(fused_like_plain(activated(of["linear"], SUM), device)) == [SUM]


CHANGES = {
    "negative_slope": (nn.LeakyReLU(0.1), 0.5),
    "max_val": (nn.ReLU6(), 0.5),
    "approximate": (nn.GELU(), "tanh"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_attribute(name, device):
    act, value = CHANGES[name]
    model = activated(copy.deepcopy(act)).to(device, torch.float64)
    plain = copy.deepcopy(model)
    report = resfused.fuse_(model)
    for each in (model, plain):
        setattr(each.act, name, value)
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    assert relative_error(model(x), plain(x)) < 1e-12
    assert f"act has changed since fuse_: its {name} is another" in str(report.check(model, x))


def test_it_is_pickled(device):
    model = nn.Sequential(conv(), norm(), nn.LeakyReLU(0.25)).to(device, torch.float64)
    report = resfused.fuse_(model)
    assert ran(report, pickle.loads(pickle.dumps(model)), device) == (1, 1)


class InvertedResidual(nn.Module):
    """As of MobileNetV2: nothing follows the last norm but the addition, where there is one."""

    def __init__(self, adds=True, act=nn.ReLU6):
        super().__init__()
        self.adds = adds
        self.conv = nn.Sequential(nn.Sequential(conv(), norm(), act()), conv(), norm())

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


def test_inverted_residuals(device):
    """Their outputs are handed on as pairs to those that add, of which no activation makes one."""
    model = nn.Sequential(*(InvertedResidual(adds, nn.SiLU) for adds in (False, True, True, False)))
    report = fused_like_plain(model, device)
    found = {(entry.norms, entry.form): entry.forked for entry in report.fused}
    last = {(f"{i}.conv.2",): form for i, form in enumerate((ALONE, SUM, SUM, ALONE))}
    assert found == {
        **{((f"{i}.conv.0.1",), "norm+silu"): False for i in range(4)},
        **{(norms, form): norms[0] in ("0.conv.2", "1.conv.2") for norms, form in last.items()},
    }
    assert ran(report, model, device) == (8, 8)


def test_a_filter(device):
    """Of a sum of two norms the one that is refused stays as it is."""
    model = activated(nn.SiLU(), SUM_NORM)
    report = resfused.fuse_(model.to(device, torch.float64), lambda module, name: name != "bn1")
    assert [(entry.form, entry.norms) for entry in report.fused] == [("norm+add+silu", ("bn2",))]
    assert [(entry.norm, entry.reason) for entry in report.left] == [("bn1", "filter_fn refuses it")]
    alone = activated(nn.Tanh()).to(device, torch.float64)
    assert not resfused.fuse_(alone, lambda module, name: False).fused


def test_a_hook_on_the_activation(device):
    """It sees the norm's output still."""
    model = activated(nn.SiLU())
    seen = []
    model.act.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    report = fused_like_plain(model, device)
    assert forms(report) == [ALONE]
    # In training and evaluation, fused and as it was.
    for actual, expected in (seen[:2], seen[2:]):
        assert relative_error(actual, expected) < 1e-12


def test_on_plain_operators_a_norm_alone_is_not_fused(device):
    model = Parts(lambda self, x: F.silu(self.b(torch.tanh(self.a(x))))).to(device, torch.float64)
    report = resfused.fuse_(model)
    assert sorted(forms(report)) == [ALONE, "norm+silu"]
    with resfused.use_backend("torch"):
        check = report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device))
    assert check.places == (1, 1)
    assert check.norms == ("bn2",)
    assert "a norm alone is PyTorch's own operator" in str(check)


def test_stochastic_depth(device):
    """Of torchvision: the identity in evaluation, and where it drops nothing."""
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(*(InvertedResidual() for _ in range(2)))
    for block, p in zip(model, (0.0, 0.5), strict=True):
        block.conv.append(ops.StochasticDepth(p, "row"))
    report = resfused.fuse_(model.to(device, torch.float64))
    modes = {(e.norms[0], e.form): (e.in_training, e.in_evaluation) for e in report.fused if "relu6" not in e.form}
    assert modes == {
        ("0.conv.2", SUM): (True, True),
        ("1.conv.2", ALONE): (True, False),
        ("1.conv.2", SUM): (False, True),
    }
    assert ran(report, model, device) == (4, 4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, device):
    model = nn.Sequential(InvertedResidual(False, nn.GELU), InvertedResidual(True, lambda: nn.LeakyReLU(0.2)))
    plain = copy.deepcopy(model.to(device, torch.float64))
    resfused.fuse_(model)
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    torch._dynamo.reset()
    actual = step(torch.compile(model, fullgraph=True, backend=backend), x)
    assert_close({name.replace("_orig_mod.", ""): t for name, t in actual.items()}, step(plain, x), 1e-9)
