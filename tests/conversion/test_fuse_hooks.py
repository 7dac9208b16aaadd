"""Fused models under those who look inside or change them: hooks, replaced modules, a second fuse_, unfuse_."""

import pickle
from itertools import product

import pytest
import torch
from oracle import assert_close, relative_error
from small_networks import PLACES, BasicBlock, activations, chain, fused_and_eager, nodes, pairs, step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import resfused
from resfused import reference


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(4), 2

    def forward(self, x):
        return torch.relu(self.bn(x)) * self.scale


def test_the_fused_chain_is_what_these_tests_take_it_for(device):
    fused, _ = fused_and_eager(chain(), device)
    x = activations(device)
    assert nodes(fused, x) == 4
    assert pairs(fused, x) == 1


class Seen:
    """What a forward hook is given, and the gradients that arrive there."""

    def __init__(self):
        self.values = []
        self.kept = []
        self.gradients = []

    def __call__(self, module, inputs, output):
        for tensor in (*inputs, output):
            self.values.append(tensor.detach().clone())
            self.kept.append(tensor)
            tensor.register_hook(lambda g: self.gradients.append(g.clone()))


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_sees_what_it_sees_in_eager(place, device):
    """Values, what becomes of the tensors that it keeps, tensor hooks' gradients, and those that it asks for."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    results = []
    for model in (fused, eager):
        seen = Seen()
        model.get_submodule(PLACES[place]).register_forward_hook(seen)
        y = model(x.clone().requires_grad_())
        asked = torch.autograd.grad(y.square().sum(), seen.kept)
        results.append({
            "values": seen.values, "kept": [t.detach() for t in seen.kept], "gradients": seen.gradients,
            "asked": asked, "output": [y],
        })  # fmt: skip
    for what, expected in results[1].items():
        actual = results[0][what]
        assert len(actual) == len(expected), what
        # Tensor hooks fire in the order of the graph, which may be another.
        for a in actual:
            assert min(relative_error(a, e) for e in expected if a.shape == e.shape) < 1e-9, what
        if what != "gradients":
            for a, e in zip(actual, expected, strict=True):
                assert relative_error(a, e) < 1e-9, what


@pytest.mark.parametrize("place", ["stage", "block that gives a pair", "convolution that reads a pair", "norm"])
def test_backward_hooks(place, device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    seen = {fused: [], eager: []}
    for model in (fused, eager):
        module = model.get_submodule(PLACES[place])
        module.register_full_backward_hook(lambda m, dx, dy, to=seen[model]: to.extend([*dx, *dy]))
        module.register_full_backward_pre_hook(lambda m, dy, to=seen[model]: to.extend(dy))
        # It cannot be changed in place where such a hook is: eager PyTorch's own limit.
        for relu in (m for m in model.modules() if isinstance(m, nn.ReLU)):
            relu.inplace = place != "norm"
        step(model, x)
    assert len(seen[fused]) == len(seen[eager]) == 3
    for actual, expected in zip(seen[fused], seen[eager], strict=True):
        assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["norm", "convolution that reads a pair"])
def test_a_lone_backward_hook(kind, place, device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    seen = {fused: [], eager: []}
    for model in (fused, eager):
        getattr(model.get_submodule(PLACES[place]), kind)(
            lambda m, *gradients, to=seen[model]: to.extend(gradients[-1])
        )
        for relu in (m for m in model.modules() if isinstance(m, nn.ReLU)):
            relu.inplace = False
        step(model, x)
    assert len(seen[fused]) == len(seen[eager]) == 1
    assert relative_error(seen[fused][0], seen[eager][0]) < 1e-9


class Doubles(nn.Module):
    """To be mixed in: a call that does more than the forward."""

    def __call__(self, *args):
        return 2 * super().__call__(*args)


def doubled(module):
    """As by module.compile(), whose result is called in place of the forward."""
    module._compiled_call_impl = lambda *args: 2 * type(module).forward(module, *args)


def own_call(module):
    module.__class__ = type("Own", (Doubles, type(module)), {"forward": type(module).forward})


@pytest.mark.parametrize("change", [doubled, own_call])
@pytest.mark.parametrize("place", ["norm", "norm of the projection", "ReLU", "block that takes a pair"])
def test_a_call_of_its_own(change, place, device):
    """A module whose call is more than its forward is called, before fuse_ and after."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    for model in (fused, eager):
        change(model.get_submodule(PLACES[place]))
    assert_close(step(fused, x), step(eager, x), 1e-9)
    if change is own_call:
        resfused.fuse_(fused)
        assert_close(step(fused, x), step(eager, x), 1e-9)


@pytest.mark.parametrize("place", ["convolution that reads a pair", "ReLU", "norm of the projection"])
def test_a_hook_after_unpickling(place, device):
    """What must stay as it is goes into the file with the code."""
    fused, eager = fused_and_eager(chain(), device)
    fused = pickle.loads(pickle.dumps(fused))
    x = activations(device)
    assert pairs(fused, x) == 1
    results = []
    eager.load_state_dict(fused.state_dict())
    for model in (fused, eager):
        seen = Seen()
        model.get_submodule(PLACES[place]).register_forward_hook(seen)
        y = model(x.clone().requires_grad_())
        results.append({"output": y, "asked": torch.autograd.grad(y.square().sum(), seen.kept)[0]})
    assert_close(*results, 1e-9)


def test_a_number_after_unpickling(device):
    """One that the code read, changed where the model was loaded."""
    model = pickle.loads(pickle.dumps(fused_and_eager(nn.Sequential(Scales()), device)[0]))
    x = activations(device)
    assert nodes(model, x) == 1
    model[0].scale = 3
    assert relative_error(model(x), Scales.forward(model[0], x)) < 1e-12


class Activation(nn.Module):
    def __init__(self):
        super().__init__()
        self.on = True

    def forward(self, x):
        return torch.relu(x) if self.on else x


class Shifted(Activation):
    def forward(self, x):
        return torch.relu(x + 1)


@pytest.mark.parametrize(("place", "how"), [*product("12", ("class", "hook", "hook before")), ("2", "number")])
def test_inlined_modules(place, how, device):
    """Whose code became a part of another module's: another class or number, or a hook on it, is seen."""
    fused, eager = fused_and_eager(
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Sequential(nn.BatchNorm2d(4)), Activation()), device
    )
    x = activations(device)
    assert nodes(fused, x) == 1
    if how == "hook before":
        resfused.unfuse_(fused)
    for model in (fused, eager):
        if how == "class":
            setattr(model, place, nn.Sequential(model[1][0], Shifted()) if place == "1" else Shifted())
        elif how == "number":
            model[2].on = False
        else:
            model[int(place)].register_forward_hook(lambda module, inputs, output: output + 1)
    if how == "hook before":
        assert [entry.form for entry in resfused.fuse_(fused).fused] == ["norm"]
    assert_close(step(fused, x), step(eager, x), 1e-9)


class PreActivation(nn.Module):
    """relu(bn(x)) first: a norm reads what the block is given, the shortcut too."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(torch.relu(self.bn(x))) + x


def test_a_hook_on_a_norm_that_reads_a_pair(device):
    fused, eager = fused_and_eager(nn.Sequential(BasicBlock(4, 4), PreActivation()), device)
    x = activations(device)
    assert pairs(fused, x) == 1
    eager.load_state_dict(fused.state_dict())
    asked = []
    for model in (fused, eager):
        seen = Seen()
        model[1].bn.register_forward_hook(seen)
        asked.append(torch.autograd.grad(model(x.clone().requires_grad_()).square().sum(), seen.kept[0]))
    assert relative_error(asked[0][0], asked[1][0]) < 1e-9


def test_fuse_again_with_a_narrower_filter(device):
    """The modules whose norms it refuses have their own forward again."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    report = resfused.fuse_(fused, lambda module, name: name.startswith("layer2"))
    assert report.norms == ("layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1")
    assert nodes(fused, x) == 2
    assert_close(step(fused, x), step(eager, x), 1e-9)


def test_pre_hooks_that_change_the_input(device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    for place in ("layer1.0", "layer2.0.conv1", "layer2.0.bn2"):
        for model in (fused, eager):
            model.get_submodule(place).register_forward_pre_hook(lambda m, inputs: (inputs[0] * 1.5,))
        assert_close(step(fused, x), step(eager, x), 1e-9)


@pytest.mark.parametrize("place", ["block that takes a pair", "convolution that reads a pair", "whole projection"])
def test_pre_hooks_that_change_in_place(place, device):
    """What the shortcut is given has changed too. Without gradients: eager has none here."""
    fused, eager = fused_and_eager(chain().eval(), device)
    x = activations(device)
    for model in (fused, eager):
        model.get_submodule(PLACES[place]).register_forward_pre_hook(halve)
    with torch.no_grad():
        assert relative_error(fused(x), eager(x)) < 1e-9


def halve(module, inputs):
    inputs[0].mul_(0.5)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_global_hooks(kind, device):
    """They fire for every module, those inside fused code too."""
    # Without changes in place, under which eager PyTorch refuses backward hooks.
    fused, eager = fused_and_eager(nn.Sequential(reference.ResidualBlock(4), reference.ResidualBlock(4)), device)
    x = activations(device)
    seen = {}
    register = register_module_forward_hook if kind == "forward" else register_module_full_backward_hook
    for model in (fused, eager):
        seen[model] = []
        names = {module: name for name, module in model.named_modules()}

        def note(module, inputs, outputs, to=seen[model], names=names):
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            to.append((names[module], [t.detach().clone() for t in (*inputs, *outputs) if t is not None]))

        handle = register(note)
        try:
            step(model, x)
        finally:
            handle.remove()
    assert sorted(name for name, _ in seen[fused]) == sorted(name for name, _ in seen[eager])
    for (name, actual), (_, expected) in zip(seen[fused], seen[eager], strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < 1e-9, name
    assert nodes(fused, x) == 4


def test_retain_grad_and_removed_hooks(device):
    """A tensor got in a hook keeps its whole gradient; without the hook the pair is back."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    kept = {}

    def keep(module, inputs, output):
        output.retain_grad()
        kept[model] = output

    for model in (fused, eager):
        handle = model.layer1[0].register_forward_hook(keep)
        step(model, x)
        handle.remove()
    assert relative_error(kept[fused].grad, kept[eager].grad) < 1e-9
    assert pairs(fused, x) == 1
