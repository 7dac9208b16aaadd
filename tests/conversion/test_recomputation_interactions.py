"""Outputs that are made again in the backward, and everything that may come between."""

import copy
import pickle

import pytest
import torch
from oracle import assert_close
from parts import CHANNELS, Parts
from recomputed import MADE_AGAIN, Shared, assert_same, both, seen, without
from small_networks import ResNet, activations, backward, chain, images, state, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import resfused


@pytest.mark.parametrize("first_backward", [True, False])
def test_a_head_after_a_step(first_backward, device):
    """As in eager: what it needs is not gone with the graph of another, nor the values that parameters had."""

    class TwoHeads(Shared):
        def forward(self, x):
            y = self.relu(self.a(x))
            return self.heads[0](y), self.heads[1](y), self.heads[2](y.detach())

    model, eager = both(TwoHeads(), device)
    x = activations(device)
    results = []
    for m in (model, eager):
        first, second, third = m(x)
        if first_backward:
            first.sum().backward()
        with torch.no_grad():
            for p in (*m.bn1.parameters(), *m.conv1.parameters()):
                p.add_(0.5)
        third.sum().backward()
        gradient = torch.autograd.grad(second.sum(), m.heads[1].weight)[0]
        results.append({"second": gradient, **state(m)})
    assert_close(*results, 1e-9)
    assert "gradient of heads.2.weight" in results[0]


CHANGES = {
    "input of the norm": lambda model, kept: kept["conv1"].add_(1),
    "weight of the norm": lambda model, kept: model.bn1.weight.add_(1),
    "weight of what keeps the output": lambda model, kept: model.conv2.weight.add_(1),
    "weight of something else": lambda model, kept: model.conv1.weight.add_(1),
    "output": lambda model, kept: kept["input of conv2"].add_(1),
    "nothing": lambda model, kept: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_between_the_passes(change, device):
    """An error exactly where eager PyTorch has one."""
    model, eager = both(Parts(lambda self, x: self.conv2(self.relu(self.a(x)))), device)
    x = activations(device).requires_grad_()
    errors, results = [], []
    for m in (model, eager):
        kept = {}
        m.conv1.register_forward_hook(lambda module, given, y, kept=kept: kept.update({"conv1": y}))
        m.conv2.register_forward_pre_hook(lambda module, given, kept=kept: kept.update({"input of conv2": given[0]}))
        y = m(x)
        with torch.no_grad():
            CHANGES[change](m, kept)
        try:
            backward(y)
            errors.append(None)
            results.append(state(m))
        except RuntimeError as error:
            errors.append(str(error).partition(":")[0])
    assert errors[0] == errors[1]
    if results:
        assert_close(*results, 1e-9)
    assert (errors[0] is None) == (change == "nothing")


class InPlace(Parts):
    """What keeps an output gets it changed; one that kept it before finds it changed."""

    def __init__(self, after):
        super().__init__()
        self.after, self.in_place = after, True

    def forward(self, x):
        y = self.relu(self.a(x))
        z = self.conv2(y) if self.after else 0
        y = y.mul_(3) if self.in_place else y * 3
        return self.conv2(y) + z


@pytest.mark.parametrize("after", [False, True])
def test_a_consumer_that_changes_the_output_in_place(after, device):
    model, eager = both(InPlace(after), device)
    x = activations(device)
    with seen() as found:
        if after:
            for m in (model, eager):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    step(m, x)
        else:
            # PyTorch's own ReLU keeps its output.
            eager.in_place = False
            assert_close(step(model, x), step(eager, x), 1e-9)
    assert not found.made


def test_double_use_and_accumulation(device):
    """Two calls before the first backward, and several steps without clearing the gradients."""
    model, eager = both(ResNet(), device)
    first, second = images(device), images(device)
    for m in (model, eager):
        a, b = m(first), m(second)
        backward(a)
        backward(b)
        backward(m(first) + m(second))
    assert_close(state(model), state(eager), 1e-9)


def test_without_gradients(device):
    model, eager = both(ResNet(), device)
    x = images(device)
    with seen() as found:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert_close({"y": model(x)}, {"y": eager(x)}, 1e-9)
        assert found.alive == 0
    assert_close(step(model, x), step(eager, x), 1e-9)


def test_second_derivatives(device):
    model, eager = both(ResNet(), device)
    x = images(device).requires_grad_()
    results = []
    for m in (model, eager):
        with seen() as found:
            (gradient,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
            gradient.square().sum().backward()
        # Both derivatives go through the forward's graph.
        assert len(found.made) == (2 * MADE_AGAIN if m is model else 0)
        results.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None and p.grad.any()})
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    model, eager = both(ResNet(), device, torch.float32)
    fused = without(model)
    x = images(device, torch.float32)
    results = []
    for m in (model, fused, eager):
        with torch.autocast(device.type, dtype), seen() as found:
            y = m(x)
        with seen() as made:
            backward(y)
        results.append({"output": y.detach(), **state(m)})
        assert len(made.made) == (MADE_AGAIN if m is model else 0)
    assert_same(*results[:2])
    assert results[0]["output"].dtype is results[2]["output"].dtype is dtype
    assert len(found.outputs) == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", [True, False])
def test_checkpointing(around, use_reentrant, device):
    """Around the model the checkpoint decides what is kept; around its blocks, in them."""
    model, eager = both(chain(), device)
    x = activations(device)
    results = []
    for m in (model, eager):
        if around:

            def call(x, m=m):
                return checkpoint(m, x, use_reentrant=use_reentrant)
        else:
            for block in (m.layer1[0], m.layer2[0]):
                block.conv1.forward = Checkpointed(block.conv1, use_reentrant)
            call = m
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        backward(y)
        results.append({"output": y.detach(), "gradient of the input": leaf.grad, **state(m)})
    assert_close(*results, 1e-9)


class Checkpointed:
    """A module's forward, computed again in the backward."""

    def __init__(self, module, use_reentrant):
        self.module, self.use_reentrant = module, use_reentrant

    def __call__(self, x):
        return checkpoint(type(self.module).forward, self.module, x, use_reentrant=self.use_reentrant)


def test_hooks_of_others_decide_what_is_kept(device):
    model, eager = both(ResNet(), device)
    x = images(device)
    with torch.autograd.graph.save_on_cpu(), seen() as found:
        actual = step(model, x)
    assert not found.made
    assert_close(actual, step(eager, x), 1e-9)


def test_torch_func(device):
    """It allows no hooks."""
    model, eager = both(chain().eval(), device)
    x = activations(device)
    gradients = []
    for m in (model, eager):
        parameters = {name: p.detach() for name, p in m.named_parameters()}

        def loss(p, m=m):
            return torch.func.functional_call(m, p, (x,)).square().sum()

        gradients.append(torch.func.grad(loss)(parameters))
    assert_close(*gradients, 1e-9)


def test_copies_and_pickles(device):
    model, eager = both(ResNet(), device)
    x = images(device)
    expected = step(copy.deepcopy(eager), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with seen() as found:
            assert_close(step(twin, x), expected, 1e-9)
        assert len(found.made) == MADE_AGAIN
        resfused.unfuse_(twin)
        assert "forward" not in vars(twin)


def test_a_copy_between_the_passes(device):
    """What is not kept is no part of the model."""
    model, eager = both(chain(), device)
    x = activations(device)
    y = model(x)
    twin = pickle.loads(pickle.dumps(model))
    backward(y)
    twice = copy.deepcopy(eager)
    for m in (eager, twice, twice):
        m.zero_grad()
        backward(m(x))
    backward(twin(x))
    assert_close(state(model), state(eager), 1e-9)
    assert_close(state(twin), state(twice), 1e-9)


@pytest.mark.parametrize("place", ["", "layer1.0", "layer1.0.conv2", "layer2.0.conv1"])
def test_hooks(place, device):
    """Forward and backward hooks of modules, and of the tensors that they give."""
    model, eager = both(chain(), device)
    x = activations(device)
    results = []
    for m in (model, eager):
        noted = {}

        def after(module, given, y, noted=noted):
            noted["forward"] = y.detach().clone()
            y.register_hook(lambda g: noted.update({"tensor": g}))

        module = m.get_submodule(place)
        module.register_forward_hook(after)
        module.register_full_backward_hook(lambda m, dx, dy, noted=noted: noted.update({"backward": dx[0]}))
        results.append({**step(m, x), **noted})
    assert_close(*results, 1e-9)


def test_global_hooks(device):
    """Every call is seen then, and nothing is fused."""
    model, eager = both(chain(), device)
    x = activations(device)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, y: None)
    try:
        with seen() as found:
            assert_close(step(model, x), step(eager, x), 1e-9)
    finally:
        handle.remove()
    assert not found.outputs


@pytest.mark.parametrize("what", ["the model", "a stage of it"])
def test_compiled(what, device):
    """The compiler decides what is kept of its code; what the rest gives it is made again."""
    model, eager = both(chain(), device)
    x = activations(device)
    torch._dynamo.reset()
    if what == "the model":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.layer2 = torch.compile(model.layer2, backend="aot_eager", fullgraph=True)
        compiled = model
    with seen() as found:
        actual = step(compiled, x)
    assert len(found.made) == (0 if what == "the model" else 2)
    assert_close(actual, step(eager, x), 1e-9)


class Untraceable(nn.Module):
    """Its code asks for values, so that it stays; a convolution that it calls keeps what another module makes."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.conv = nn.Conv2d(CHANNELS, 2, 1)

    def forward(self, x):
        return self.conv(self.part(x)) if x.sum() < 1e9 else x


def test_a_model_that_cannot_be_traced(device):
    model, eager = both(Untraceable(), device)
    x = activations(device)
    with seen() as found:
        assert_close(step(model, x), step(eager, x), 1e-9)
    assert (len(found.outputs), len(found.made)) == (1, 1)
    assert "outputs made again" in repr(model)
    resfused.unfuse_(model)
    assert "forward" not in vars(model)


class Called(Parts):
    def forward(self, x, factor=1.0):
        return self.conv2(self.relu(self.a(x))) * factor


def test_a_call_planned_when_it_comes(device):
    model, eager = both(Called(), device)
    x = activations(device)
    assert_close({"y": model(x, 2.0)}, {"y": eager(x, 2.0)}, 1e-9)
    with seen() as found:
        model(x, 3.0).sum().backward()
    assert len(found.made) == 1


class OnStream:
    """A module's forward on a stream, which waits for the current one."""

    def __init__(self, module, stream):
        self.module, self.stream = module, stream

    def __call__(self, x):
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            y = type(self.module).forward(self.module, x)
        current.wait_stream(self.stream)
        y.record_stream(current)
        return y


@pytest.mark.gpu
def test_streams(device):
    """Each of several heads makes their common input on its own stream."""
    model, eager = both(Shared(), device)
    x = activations(device)
    results = []
    for m in (model, eager):
        for head in m.heads:
            head.forward = OnStream(head, torch.cuda.Stream())
        with seen() as found:
            results.append(step(m, x))
        torch.cuda.synchronize()
        assert len(found.made) == (3 if m is model else 0)
    assert_close(*results, 1e-9)
