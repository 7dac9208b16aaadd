"""Frozen norms of libraries: their numbers, in every form and with any activation; what is kept; what is told."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from count import coverage
from count.node_passes import kept_by
from covering import covering
from frozen_cases import CopiedFrozenBatchNorm2d, OfDetectron2, importable, with_random_frozen_norms
from oracle import assert_close, relative_error
from parts import ADD, ADD_NORM, ALONE, CHANNELS, RELU, Parts
from resfused.kernels.activation import ACTIVATIONS, activation_of
from small_networks import activations, counted, step
from torch import nn

import resfused
from resfused import Fused, reference

EACH = [activation_of(name, 0.2) for name in ACTIVATIONS]
KINDS = ("torchvision", "detectron2")
ADDED = ("nothing", "a tensor", "a norm")
DTYPES = [
    (torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16),
]  # fmt: skip
# Of a result's rounding, normwise.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture
def frozen(torchvision, device):
    """A random norm of a kind, with buffers in a dtype."""
    classes = {"torchvision": torchvision.ops.misc.FrozenBatchNorm2d, "detectron2": OfDetectron2}

    def make(kind, dtype=torch.float64, channels=CHANNELS):
        return with_random_frozen_norms(classes[kind](channels, eps=0.1)).to(device, dtype)

    return make


def in_float64(norm, x):
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def called(function, norm, other, added, inputs):
    """Output and gradients of activation(norm(x) + s)."""
    x, residual = leaves = [t.detach().clone().requires_grad_() for t in inputs]
    given = {"nothing": (x,), "a tensor": (x, residual), "a norm": (x, residual, other)}[added]
    y = function(norm, *given)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    gradients = torch.autograd.grad(y, leaves[: len(given[:2])], dy)
    return {"output": y.detach(), **dict(zip(("dx", "dresidual"), gradients, strict=False))}


def plain(normed, activation):
    def function(norm, x, residual=None, other=None):
        z = normed(norm, x)
        if residual is not None:
            z = z + (residual if other is None else normed(other, residual))
        return reference.activate(z, activation)

    return function


@covering(kind=KINDS, added=ADDED, activation=EACH, dtypes=DTYPES)
def test_tail(kind, added, activation, dtypes, device, frozen):
    """To the rounding of its result, which has the dtype that the module's has."""
    norm, other = frozen(kind, dtypes[1]), frozen(kind, dtypes[1])
    inputs = [activations(device, dtypes[0]) for _ in range(2)]
    with counted() as ran:
        ours = called(
            lambda *given: resfused.tail(*given, activation=activation),
            norm, other, added, inputs,
        )  # fmt: skip
    assert ran[:2] == [1, 1]
    theirs = called(plain(lambda norm, x: norm(x), activation), norm, other, added, inputs)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    exact = called(plain(in_float64, activation), norm, other, added, [t.double() for t in inputs])
    sixth = 1e-7 if activation.name == "hardsigmoid" else 0
    for name, tensor in ours.items():
        kinks = activation.slopes is not None and ours["output"].dtype in (torch.bfloat16, torch.float16)
        near = max(ROUNDING[tensor.dtype] * (4 if kinks else 2), sixth)
        assert relative_error(tensor, exact[name]) < near, name


def kept(function):
    """In full-size tensors in float32."""
    inputs = [torch.randn(4, CHANNELS, 4, 8, requires_grad=True) for _ in range(2)]
    return kept_by(lambda: function(*inputs))


BIT = 1 / 32


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("activation", EACH, ids=lambda a: a.name)
def test_what_is_kept(activation, added, frozen):
    """No more than the derivative needs: a bit an element, or z. A BatchNorm in evaluation keeps no more, too."""
    least = 0 if activation.name in ("identity", "sigmoid") else 1 if activation.slopes is None else BIT
    if activation.name == "sigmoid" and added == "nothing":
        # What it is made of, where eager keeps the output.
        least = 1
    evaluated = [nn.BatchNorm2d(CHANNELS).eval().requires_grad_(False) for _ in range(2)]
    for norms in ([frozen("torchvision", torch.float32) for _ in range(2)], evaluated):

        def ours(x, residual, norms=norms):
            given = {"nothing": (), "a tensor": (residual,), "a norm": (residual, norms[1])}[added]
            return resfused.tail(norms[0], x, *given, activation=activation)

        def eager(x, residual, norms=norms):
            z = norms[0](x)
            if added != "nothing":
                z = z + (residual if added == "a tensor" else norms[1](residual))
            return reference.activate(z, activation)

        assert kept(ours) == least
        if activation.name != "sigmoid":
            assert least <= kept(eager) + (BIT if activation.slopes else 0)


class Residual(Parts):
    def __init__(self, make):
        super().__init__()
        self.bn1, self.bn2 = make(), make()

    def forward(self, x):
        out = self.b(self.relu(self.a(x)))
        out += x
        return self.relu(out)


def chain(make):
    """Two blocks, of which one hands the other a pair."""
    return nn.Sequential(Residual(make), Residual(make))


def fused_and_plain(model, device):
    plain = with_random_frozen_norms(model).to(device, torch.float64)
    fused = copy.deepcopy(plain)
    return fused, plain, resfused.fuse_(fused)


def assert_same(fused, plain, x, ran):
    """A step in each mode, with so many nodes forward, backward, and backward of pairs."""
    for training in (True, False):
        with counted() as found:
            actual = step(fused.train(training), x)
        assert found == ran
        assert_close(actual, step(plain.train(training), x), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fuse(kind, device, frozen, monkeypatch):
    """In both modes; state, copies and files are what they were."""
    importable(monkeypatch)
    fused, plain, report = fused_and_plain(chain(lambda: frozen(kind)), device)
    assert not report.left
    assert [(entry.form, entry.frozen) for entry in report.fused] == 2 * [(RELU, True), (ADD, True)]
    x = activations(device)
    assert report.check(fused, x).places == (4, 4)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(twin, plain, x, [4, 4, 1])
        resfused.unfuse_(twin)
        assert_same(twin, plain, x, [0, 0, 0])


class Forms(Parts):
    """A norm alone, of two norms added, before a smooth activation; one is given what has half as many channels."""

    def __init__(self, make):
        super().__init__()
        self.bn1, self.bn2, self.bn3, self.bn4 = make(), make(), make(), make()

    def forward(self, x):
        y = F.hardswish(self.a(x) + self.b(x))
        y = F.silu(self.bn3(y) + x)
        return self.bn4(y).sin()


@pytest.mark.parametrize("kind", [*KINDS, "copied"])
def test_forms(kind, device, frozen):
    model = Forms(lambda: CopiedFrozenBatchNorm2d(CHANNELS) if kind == "copied" else frozen(kind))
    fused, plain, report = fused_and_plain(model, device)
    assert {entry.form for entry in report.fused} == {"norm+add(norm)+hardswish", "norm+add+silu", ALONE}
    assert all(entry.frozen for entry in report.fused)
    x = activations(device)
    assert report.check(fused, x).places == (3, 3)
    assert_same(fused, plain, x, [3, 3, 0])


def test_what_timm_freezes(timm, device):
    """Its own norms with an activation, and torchvision's."""
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=10)
    fused, plain, report = fused_and_plain(timm.layers.freeze_batch_norm_2d(network).eval(), device)
    assert not report.left
    assert len(report.norms) == sum("FrozenBatchNorm" in type(m).__name__ for m in plain.modules()) > 30
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device)
    assert not report.check(fused, x).idle
    errors = coverage.differences(coverage.results(fused, x), coverage.results(plain, x))
    assert max(errors.values()) < 1e-7, errors


def test_beside_a_batch_norm(frozen, device):
    """Which in training takes the batch's statistics: they are called apart; in evaluation together."""
    model = Parts(lambda self, x: self.relu(self.a(x) + self.b(x)))
    model.bn2 = frozen("torchvision")
    fused, plain, report = fused_and_plain(model, device)
    assert [(entry.form, entry.frozen) for entry in report.fused] == [(ADD_NORM, False)]
    x = activations(device)
    assert_same(fused, plain, x, [1, 1, 0])
    assert report.check(fused, x).norms_in_evaluation == ("bn1", "bn2")
    assert report.check(fused, x).norms == ("bn1",)


INPUTS = {
    "no batch": (CHANNELS, 6, 4),
    "broadcast": (2, 1, 6, 4),
    "nothing": (0, CHANNELS, 6, 4),
}


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kind", ["torchvision", "copied"])
def test_what_is_broadcast(shape, kind, frozen, device):
    """Other shapes than a batch norm's are what the module's own operators make of them."""
    norm = frozen("torchvision") if kind == "torchvision" else CopiedFrozenBatchNorm2d(CHANNELS).double().to(device)
    fused, plain, _ = fused_and_plain(nn.Sequential(norm, nn.ReLU()), device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    with counted() as ran:
        assert_close(step(fused, x), step(plain, x), 1e-12)
        assert_close({"y": resfused.tail(norm, x)}, {"y": norm(x).relu()}, 1e-12)
    assert ran == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, frozen, device):
    """The result's dtype is the module's, where the convolutions' is another."""
    plain = with_random_frozen_norms(chain(lambda: frozen(kind, torch.float32))).to(device)
    fused = copy.deepcopy(plain)
    resfused.fuse_(fused)
    x = activations(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16), counted() as ran:
        y, expected = fused(x), plain(x)
    assert ran == [4, 0, 0]
    assert y.dtype is expected.dtype is (torch.float32 if kind == "torchvision" else torch.bfloat16)
    assert relative_error(y, expected) < 2**-7


def test_changed_after_fusing(frozen, device):
    """Buffers, eps and the norms themselves are those of the call."""
    fused, plain, _ = fused_and_plain(chain(lambda: frozen("torchvision")), device)
    x = activations(device)
    for model in (fused, plain):
        model[0].bn1.eps = 0.7
        model[0].bn2.load_state_dict({name: t * 2 for name, t in model[0].bn2.state_dict().items()}, assign=True)
        model[1].bn1.running_var.mul_(3)
        model[1].bn2 = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, device=device)
    assert_same(fused, plain, x, [4, 4, 1])


def test_what_has_another_class(torchvision, device):
    """In the module of the frozen norm; one that inherits its forward is one, by another name too."""
    other = torchvision.ops.misc.Permute([0, 1, 2, 3])
    kind = type("Another", (torchvision.ops.misc.FrozenBatchNorm2d,), {})
    fused, plain, report = fused_and_plain(nn.Sequential(other, kind(CHANNELS), nn.ReLU()), device)
    assert report.norms == ("1",)
    assert_same(fused, plain, activations(device), [1, 1, 0])
    with pytest.raises(TypeError, match=r"norm must be a BatchNorm, .* or a FrozenBatchNorm2d, but got Permute"):
        resfused.tail(other, activations(device))


class NearlyFrozenBatchNorm2d(CopiedFrozenBatchNorm2d):
    """Its code, but for one thing."""

    def __init__(self, code):
        super().__init__(4)
        self.code = code

    def forward(self, x):
        w, b, v, m = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        return getattr(self, self.code)(x, w, b, v, m)

    def another_scale(self, x, w, b, v, m):
        return x * (w * (v + 0.1).rsqrt()) + (b - m * w)

    def no_root(self, x, w, b, v, m):
        scale = w * (v + 0.1)
        return x * scale + (b - m * scale)

    def another_sign(self, x, w, b, v, m):
        scale = w * (v + 0.1).rsqrt()
        return x * scale + (m * scale - b)

    def another_axis(self, x, *_):
        w, b, v, m = (t.view(1, 1, -1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (v + 0.1).rsqrt()
        return x * scale + (b - m * scale)


@pytest.mark.parametrize("code", ["another_scale", "no_root", "another_sign", "another_axis"])
def test_code_that_is_nearly_one(code, device):
    fused, plain, report = fused_and_plain(nn.Sequential(NearlyFrozenBatchNorm2d(code), nn.ReLU()), device)
    assert len(report.left) == 1
    x = torch.randn(2, CHANNELS, CHANNELS, 3, dtype=torch.float64, device=device)
    assert_same(fused, plain, x, [0, 0, 0])


class FrozenBatchNorm2d(nn.Module):
    """By its name."""

    def forward(self, x):
        return x * 2


def test_left(frozen, device):
    fused, plain, _ = fused_and_plain(chain(lambda: frozen("torchvision")), device)
    fused[0].bn1.register_forward_hook(lambda module, given, y: y * 2)
    plain[0].bn1.register_forward_hook(lambda module, given, y: y * 2)
    fused[1].bn1 = plain[1].bn1 = FrozenBatchNorm2d()
    report = resfused.fuse_(fused, lambda norm, name: name != "1.bn2")
    reasons = {left.norm: left.reason for left in report.left}
    assert reasons == {
        "0.bn1": "a hook is on it",
        "1.bn1": "the forward of its class FrozenBatchNorm2d has neither F.batch_norm nor a known frozen norm",
        "1.bn2": "filter_fn refuses it",
    }
    assert_same(fused, plain, activations(device), [1, 1, 1])


def test_compiled(frozen, device):
    fused, plain, _ = fused_and_plain(chain(lambda: frozen("torchvision")), device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = activations(device)
    with counted() as ran:
        actual = step(compiled, x)
    assert ran[:2] == [4, 4]
    assert_close(actual, step(plain, x), 1e-12)


def test_passes(frozen):
    report = resfused.fuse_(chain(lambda: frozen("torchvision")))
    assert str(report).splitlines() == [
        "4 of 4 norms fused in 4 places",
        "     2 frozen norm+relu: 4.12 passes over memory a training step, not 11",
        "     2 frozen norm+add+relu: 6.12 passes over memory a training step, not 14, 1 pair handed on",
    ]
    # Eager's, less ours.
    saved = {"norm": 2, "norm+silu": 6, "norm+add": 4, "norm+add+silu": 4, "norm+add(norm)": 9}
    for form, passes in saved.items():
        assert Fused("", form, ("bn",), False, True, frozen=True).passes_saved == passes
