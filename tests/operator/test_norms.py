"""The norm modules against torch.nn.BatchNorm followed by the addition and the ReLU."""

import copy
import inspect
import io
import pickle
from types import MethodType
from unittest import mock

import pytest
import torch
from oracle import relative_error
from resfused.kernels import gpu
from torch import nn

import resfused

RANKS = {1: (4, 5, 6), 2: (4, 5, 3, 4), 3: (2, 5, 3, 2, 2)}
SETTINGS = {
    "default": {},
    "cumulative average": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "eps and momentum": {"eps": 0.1, "momentum": 0.7},
    "float64": {"dtype": torch.float64},
}


def pair(rank, residual, settings, device):
    """Ours and PyTorch's module with the same random parameters."""
    name = f"{'BatchNormAddReLU' if residual else 'BatchNormReLU'}{rank}d"
    settings = {"dtype": torch.float64, "device": device, **settings}
    ours, eager = getattr(resfused, name)(5, **settings), getattr(nn, f"BatchNorm{rank}d")(5, **settings)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn(5))
    ours.load_state_dict(eager.state_dict())
    return ours, eager


def step(ours, eager, shape, residual, device):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    r = torch.randn(shape, dtype=torch.float64, device=device)
    inputs = [x.clone().requires_grad_(), r.clone().requires_grad_()], [x.requires_grad_(), r.requires_grad_()]
    y = ours(*inputs[0]) if residual else ours(inputs[0][0])
    expected = (eager(inputs[1][0]) + (inputs[1][1] if residual else 0)).relu()
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert relative_error(y, expected) < 1e-12
    for a, b in zip(*inputs, strict=True):
        assert (a.grad is None and b.grad is None) or relative_error(a.grad, b.grad) < 1e-11


def assert_same_state(ours, eager):
    assert ours.state_dict().keys() == eager.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)
    for (name, a), (_, b) in zip(ours.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_training_then_eval(rank, residual, settings, device):
    ours, eager = pair(rank, residual, SETTINGS[settings], device)
    for _ in range(3):
        step(ours, eager, RANKS[rank], residual, device)
        assert_same_state(ours, eager)
    ours.eval()
    eager.eval()
    step(ours, eager, RANKS[rank], residual, device)
    assert_same_state(ours, eager)


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_vectors_of_features(residual, device):
    ours, eager = pair(1, residual, {}, device)
    step(ours, eager, (7, 5), residual, device)
    assert_same_state(ours, eager)


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_empty_batch(residual, device):
    ours, eager = pair(2, residual, {}, device)
    step(ours, eager, (0, 5, 3, 3), residual, device)
    assert_same_state(ours, eager)
    assert int(ours.num_batches_tracked) == 1


def test_without_bias(device):
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this PyTorch's BatchNorm takes no bias argument")
    ours, eager = pair(2, True, {"bias": False}, device)
    assert ours.bias is None
    step(ours, eager, RANKS[2], True, device)
    assert_same_state(ours, eager)


def test_is_a_batch_norm_of_the_same_signature():
    for rank in RANKS:
        eager = getattr(nn, f"BatchNorm{rank}d")
        for name in ("BatchNormReLU", "BatchNormAddReLU"):
            ours = getattr(resfused, f"{name}{rank}d")
            assert issubclass(ours, eager)
            assert inspect.signature(ours) == inspect.signature(eager)


def test_a_failed_call_changes_no_buffer(device):
    """PyTorch counts the batch before it fails; we do not."""
    norm = resfused.BatchNormAddReLU2d(5, device=device)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 5, 3, 3, device=device)
    for bad in ((x, x[:, :, :2]), (x[0], x[0]), (x[:1, :, :1, :1], x[:1, :, :1, :1]), (x.int(), x), (x, x.int())):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            norm(*bad)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_tracking_switched_off_after_construction(residual, device):
    """In training the buffers stay as they are and the call is not counted; in evaluation they are used."""
    ours, eager = pair(2, residual, {}, device)
    step(ours, eager, RANKS[2], residual, device)
    for norm in (ours, eager):
        norm.track_running_stats = False
    step(ours, eager, RANKS[2], residual, device)
    assert_same_state(ours, eager)
    assert int(ours.num_batches_tracked) == 1
    step(ours.eval(), eager.eval(), RANKS[2], residual, device)


def test_copies(device):
    """deepcopy, pickle and torch.save of the whole module."""
    norm = resfused.BatchNormReLU2d(5, device=device)
    x = torch.randn(4, 5, 3, 3, device=device)
    norm(x)
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    expected = copy.deepcopy(norm).eval()(x)
    for clone in (pickle.loads(pickle.dumps(norm)), torch.load(buffer, weights_only=False)):
        assert torch.equal(clone.eval()(x), expected)


def test_hooks_see_what_they_would_see(device):
    """A norm with a hook is called as it is, so the hook fires on the norm's own output."""
    block = resfused.ResidualBlock(4).to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    seen = []
    block.bn2.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    y = block(x)
    torch.testing.assert_close(y, (seen[0] + x).relu())


def test_norms_in_two_modes(device):
    """A shortcut norm frozen inside a training block keeps its statistics and uses them."""
    ours = resfused.ProjectionResidualBlock(3, 4).to(device, torch.float64)
    eager = resfused.reference.ProjectionResidualBlock(3, 4).to(device, torch.float64)
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, device=device)
    for block in (ours, eager):
        block.shortcut[1].eval()
    torch.testing.assert_close(ours(x), eager(x), rtol=1e-11, atol=1e-12)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_a_hook_on_a_fused_norm_sees_its_output(device):
    norm = resfused.BatchNormReLU2d(5, device=device)
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = norm(torch.randn(4, 5, 3, 3, device=device))
    assert len(seen) == 1
    assert seen[0] is y


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, as timm's BatchNormAct2d is one."""

    def forward(self, input):
        return 2 * super().forward(input).sigmoid()


def patched(norm):
    """With a forward on the instance, as accelerate puts one there."""
    norm.forward = MethodType(lambda self, x: 3 * nn.BatchNorm2d.forward(self, x), norm)
    return norm


OWN = {
    "subclass": Scaled,
    "instance": lambda *args, **kwargs: patched(nn.BatchNorm2d(*args, **kwargs)),
    "fused with a ReLU": resfused.BatchNormReLU2d,
    "compiled": lambda *args, **kwargs: torch.compile(nn.BatchNorm2d(*args, **kwargs), backend="eager"),
}


@pytest.mark.parametrize(
    ("own", "second"),
    [("subclass", None), ("subclass", "first"), ("subclass", "second"), ("subclass", "both"), ("instance", None),
     ("instance", "second"), ("fused with a ReLU", "first"), ("fused with a ReLU", "second"), ("compiled", "both")],
)  # fmt: skip
def test_tail_calls_a_forward_of_the_norms_own(own, second, device):
    """relu(norm(input) + s) is of what calling the norm gives; the other norm of two is fused where it can be."""
    settings = {"device": device, "dtype": torch.float64}
    plain = nn.BatchNorm2d(5, **settings)
    norms = {
        None: (OWN[own](5, **settings), None),
        "first": (OWN[own](5, **settings), plain),
        "second": (plain, OWN[own](5, **settings)),
        "both": (OWN[own](5, **settings), OWN[own](5, **settings)),
    }[second]
    twins = copy.deepcopy(norms)
    x, r = torch.randn(2, 4, 5, 3, 3, **settings).unbind()
    with mock.patch.object(gpu, "forward", wraps=gpu.forward) as launched:
        y = resfused.tail(norms[0], x, r, norms[1])
    expected = twins[0](x) + (r if twins[1] is None else twins[1](r))
    torch.testing.assert_close(y, expected.relu(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(resfused.tail(norms[0], x), twins[0](x).relu(), rtol=1e-11, atol=1e-12)
    for norm, twin in zip(norms, twins, strict=True):
        if norm is not None:
            assert_same_state(norm, twin)
    if own != "fused with a ReLU":
        assert launched.call_count == (1 if second == "second" else 0)


@pytest.mark.parametrize("hook", [False, True], ids=["", "with a hook"])
def test_tail_of_one_norm_twice_takes_the_input_first(hook, device):
    ours, eager = nn.BatchNorm2d(5).to(device), nn.BatchNorm2d(5).to(device)
    x, r = torch.randn(2, 4, 5, 3, 3, device=device).unbind()
    if hook:
        ours.register_forward_hook(lambda *_: None)
    y = resfused.tail(ours, x, r, ours)
    torch.testing.assert_close(y, (eager(x) + eager(r)).relu())
    assert_same_state(ours, eager)
