"""Kernels called without the dispatcher: only on tensors that are their memory, and where nobody looks on."""

import pytest
import torch
from oracle import problem
from torch.overrides import TorchFunctionMode

from resfused import functional, reference
from resfused.operator import direct, ops


def node(p, library=functional, **changed):
    t = p.tensors | changed
    return library.batch_norm_add_relu(
        t["input"], t["residual"], t["running_mean"].clone(), t["running_var"].clone(), t["weight"], t["bias"], True
    )


@pytest.fixture
def p(device):
    return problem("norm+add+relu", (4, 6, 3, 2), torch.float64, device)


@pytest.fixture
def dispatched(monkeypatch):
    """The calls that went to the dispatcher."""
    calls = []
    for name in ("forward_training", "backward"):
        operator = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, name=name, operator=operator: calls.append(name) or operator(*args)
        )
    return calls


def gradients(p, library, dy, x=None):
    x = (p.tensors["input"] if x is None else x).detach().requires_grad_()
    residual = p.tensors["residual"].detach().requires_grad_()
    return torch.autograd.grad(node(p, library, input=x, residual=residual), (x, residual), dy)


def test_plain_tensors_go_straight_to_the_kernels(p, dispatched):
    gradients(p, functional, p.dy)
    node(p, input=torch.nn.Parameter(p.tensors["input"]))
    with torch.no_grad():
        node(p)
    with torch.inference_mode():
        node(p)
    assert dispatched == []


@pytest.mark.parametrize("where", ["input", "residual", "weight"])
def test_lazily_negated_tensors(p, where, dispatched):
    """Their memory has the other sign."""
    negated = torch._neg_view(p.tensors[where])
    torch.testing.assert_close(node(p, **{where: negated}), node(p, reference, **{where: -p.tensors[where]}))
    assert dispatched == ["forward_training"]


def test_lazily_negated_and_zero_gradients(p, dispatched):
    for dy, equal in (
        (torch._neg_view(p.dy), -p.dy),
        (torch._efficientzerotensor(p.dy.shape, dtype=p.dy.dtype), 0 * p.dy),
    ):
        for found, expected in zip(gradients(p, functional, dy), gradients(p, reference, equal), strict=True):
            torch.testing.assert_close(found, expected)
    assert dispatched == ["backward", "backward"]


def test_subclasses(p, dispatched):
    class Own(torch.Tensor):
        pass

    y = node(p, input=p.tensors["input"].as_subclass(Own))
    assert isinstance(y, Own)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), node(p, reference))
    assert dispatched == ["forward_training"]


def test_whoever_looks_on_is_shown_the_operators(p):
    class Names(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Names() as seen:
        node(p)
    assert any("resfused.forward_training" in name for name in seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        gradients(p, functional, p.dy)
    names = {event.key for event in profiler.key_averages()}
    assert {"resfused::forward_training", "resfused::backward"} <= names


def test_what_is_plain(device):
    x = torch.ones(2, device=device)
    assert direct.is_plain(x, None, torch.nn.Parameter(x))
    others = torch._neg_view(x), torch._to_functional_tensor(x), torch.ones(2, device="meta"), x.to_sparse()
    for other in others:
        assert not direct.is_plain(x, other)
