"""A chain of blocks that hand each other their output as a pair: gradients whole, additions nowhere."""

import copy
from unittest import mock

import pytest
import torch
from oracle import LAYOUTS, in_layout, relative_error
from resfused.kernels import gpu as kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resfused
from resfused import reference
from resfused.norms import forked_tail

CHAIN = (
    ("ProjectionResidualBlock", (4, 6, 2)),
    ("ResidualBlock", (6,)),
    ("ProjectionResidualBlock", (6, 8, 1)),
    ("ResidualBlock", (8,)),
)


def chains(device, dtype=torch.float64):
    """Ours in our Sequential, and the reference blocks in PyTorch's, with the same parameters."""
    eager = nn.Sequential(*(getattr(reference, name)(*arguments) for name, arguments in CHAIN)).to(device, dtype)
    ours = resfused.Sequential(*(getattr(resfused, name)(*arguments) for name, arguments in CHAIN)).to(device, dtype)
    ours.load_state_dict(eager.state_dict())
    return ours, eager


def step(model, x, dy_of=torch.ones_like):
    """Everything that a training step leaves behind."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(dy_of(y))
    return (
        {"output": y, "input": x.grad} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
    )


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) < tolerance, name


def pairs_handed_on():
    """Counts the backward calls that were given two gradients to add."""
    return mock.patch.object(kernels, "backward", wraps=kernels.backward)


def forks(counted):
    return sum(call.args[1] is not None for call in counted.call_args_list)


class Additions(TorchDispatchMode):
    """Counts additions of whole activations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and getattr(args[0], "ndim", 0) == 4:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chain_of_four(layout, device, launches):
    ours, eager = chains(device)
    x = in_layout(torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device), layout)
    for _ in range(2):
        with pairs_handed_on() as counted:
            actual = step(ours, x)
        assert forks(counted) == 3
        assert_same(actual, step(eager, x))


def test_no_addition_of_activations_is_left(device):
    """Between the blocks none; at the chain's own input, which it does not make, the one of autograd."""
    ours, _ = chains(device)
    y = ours(torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device).requires_grad_())
    with Additions() as additions:
        y.sum().backward()
    assert additions.count == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("half", [0, 1])
def test_only_one_half_has_a_gradient(half, training, device):
    """Its gradient is the whole, whichever it is."""
    (x, r), norm = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, device=device), nn.BatchNorm2d(4)
    gradients = []
    norm.to(x).train(training)
    for tail in (lambda x, r: forked_tail(norm, x, r)[half], lambda x, r: (norm(x) + r).relu()):
        leaves = [x.clone().requires_grad_(), r.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(tail(*leaves).square().sum(), [*leaves, *norm.parameters()]))
    for ours, eager in zip(*gradients, strict=True):
        assert relative_error(ours, eager) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend, device):
    torch._dynamo.reset()
    ours, eager = chains(device)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    with pairs_handed_on() as counted:
        y = compiled(x)
        y.backward(torch.ones_like(y))
    assert forks(counted) == 3
    expected = step(eager, x)
    assert relative_error(y, expected["output"]) < 1e-9
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-9, name


def test_a_hook_on_a_block_sees_the_whole_gradient(device):
    ours, eager = chains(device)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    seen = {}
    for model in (ours, eager):
        model[1].register_forward_hook(lambda m, i, o, model=model: seen.update({model: o}))
    outputs = {model: model(x).square().sum() for model in (ours, eager)}
    gradients = [torch.autograd.grad(outputs[m], seen[m])[0] for m in (ours, eager)]
    assert relative_error(*gradients) < 1e-9


def test_a_hook_inside_a_block_sees_the_whole_gradient(device):
    ours, eager = chains(device)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    seen = {}
    for model in (ours, eager):
        model[2].shortcut[0].register_forward_pre_hook(lambda m, i, model=model: seen.update({model: i[0]}))
    gradients = [torch.autograd.grad(m(x).square().sum(), seen[m])[0] for m in (ours, eager)]
    assert relative_error(*gradients) < 1e-9


def test_output_used_elsewhere(device):
    """A module in the chain that taps the output of a block: a third use, summed by autograd."""

    class Tap(nn.Module):
        def forward(self, x):
            self.tapped = x
            return x * 2

    ours, eager = chains(device)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    gradients = []
    for model, kind in ((ours, resfused.Sequential), (eager, nn.Sequential)):
        tap = Tap()
        tapped = kind(model[0], model[1], tap, model[2], model[3])
        loss = tapped(x).square().sum() + tap.tapped.sin().sum()
        gradients.append(torch.autograd.grad(loss, [tap.tapped, *model.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, device):
    ours, eager = chains(device)

    class Checkpointed(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage

        def forward(self, x):
            return checkpoint(self.stage, x, use_reentrant=use_reentrant)

    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    actual, expected = step(Checkpointed(ours), x), step(Checkpointed(eager), x)
    assert_same(actual, expected)


def test_partly_frozen_and_without_gradients(device):
    ours, eager = chains(device)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    for model in (ours, eager):
        model[0].requires_grad_(False)
        model[1].bn2.eval()
        model[2].shortcut[1].requires_grad_(False)
    gradients = [
        torch.autograd.grad(m(x).square().sum(), [p for p in m.parameters() if p.requires_grad]) for m in (ours, eager)
    ]
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-9
    with torch.no_grad():
        assert relative_error(ours.eval()(x), eager.eval()(x)) < 1e-9


def test_second_derivative(device):
    ours, eager = chains(device)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, device=device)
    penalties = []
    for model in (ours, eager):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), model[0].conv1.weight)[0])
    assert relative_error(*penalties) < 1e-8


def test_other_modules_and_copies(device):
    """Modules that are no blocks, subclasses with a forward of their own, deepcopy and state_dict keys."""

    class Own(resfused.ResidualBlock):
        def forward(self, x):
            return super().forward(x) * 0.5

    model = resfused.Sequential(nn.Conv2d(3, 4, 1), resfused.ResidualBlock(4), Own(4), nn.ReLU()).to(device)
    x = torch.randn(2, 3, 5, 5, device=device)
    expected = x
    for module in copy.deepcopy(model):
        expected = module(expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert list(model.state_dict()) == list(nn.Sequential(*model).state_dict())
    assert torch.equal(resfused.Sequential()(x), x)


def test_the_same_step_twice_gives_the_same_bits(device):
    ours, _ = chains(device, torch.float32)
    x = torch.randn(2, 4, 6, 5, device=device)
    first, second = step(copy.deepcopy(ours), x), step(copy.deepcopy(ours), x)
    assert all(torch.equal(first[name], second[name]) for name in first)
