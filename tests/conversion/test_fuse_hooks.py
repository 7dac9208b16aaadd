"""Fused models under those who look inside or change them: hooks, replaced modules, a second fuse_, unfuse_."""

import copy
import pickle
from itertools import product
from unittest import mock

import pytest
import torch
from oracle import assert_close, relative_error
from resfused.kernels import gpu as kernels
from small_networks import BasicBlock, ResNet, activations, chain, fused_and_eager, images, is_fused, step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import resfused
from resfused import reference

PLACES = {
    "the model": "",
    "stage": "layer1",
    "block that gives a pair": "layer1.0",
    "block that takes a pair": "layer2.0",
    "norm": "layer1.0.bn1",
    "norm before the addition": "layer1.0.bn2",
    "norm of the projection": "layer2.0.downsample.1",
    "ReLU": "layer1.0.relu",
    "convolution": "layer1.0.conv2",
    "convolution that reads a pair": "layer2.0.conv1",
    "projection that reads a pair": "layer2.0.downsample.0",
    "whole projection": "layer2.0.downsample",
}


def pairs(model, x):
    """How many nodes of a training step were given two gradients to add."""
    with mock.patch.object(kernels, "backward", wraps=kernels.backward) as counted:
        step(model, x)
    return sum(call.args[1] is not None for call in counted.call_args_list)


def nodes(model, x):
    """How many fused nodes a training step has."""
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
        step(copy.deepcopy(model), x)
    return counted.call_count


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


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(4), 2

    def forward(self, x):
        return torch.relu(self.bn(x)) * self.scale


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
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), Activation()), device
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
        assert not resfused.fuse_(fused).fused
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


REPLACEMENTS = {
    "another activation": lambda m: setattr(m.layer1[0], "relu", nn.SiLU()),
    "another norm": lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(2, 4)),
    "no norm": lambda m: setattr(m.layer2[0], "bn2", nn.Identity()),
    "no shortcut": lambda m: setattr(m.layer2[0].downsample, "1", nn.Identity()),
    "a block appended": lambda m: m.layer2.append(nn.Sigmoid()),
    "a block in front": lambda m: m.layer1.insert(0, nn.Tanh()),
    "a block taken away": lambda m: m.layer1.__delitem__(0),
    "another block": lambda m: m.layer2.__setitem__(0, nn.Conv2d(4, 6, 1)),
    "another convolution": lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(4, 4, 1, bias=False)),
    "other numbers": lambda m: (setattr(m.layer1[0].bn1, "eps", 0.5), setattr(m.layer1[0].bn2, "momentum", None)),
    "no running statistics": lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(4, track_running_stats=False)),
    "no parameters": lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(4, affine=False)),
    "another stage": lambda m: setattr(m, "layer2", nn.Flatten()),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_after_fuse(name, device):
    """The model computes what the unfused one with the same change computes."""
    fused, eager = fused_and_eager(chain(), device)
    for model in (fused, eager):
        torch.manual_seed(1)
        REPLACEMENTS[name](model)
        model.to(device, torch.float64)
    x = activations(device)
    assert_close(step(fused, x), step(eager, x), 1e-9)


class Keeps(nn.Module):
    """Shows its input to others."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        self.kept = x
        return self.module(x)


@pytest.mark.parametrize("place", ["layer2.0", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.downsample"])
def test_replaced_by_what_keeps_its_input(place, device):
    """It is given a tensor with the whole gradient, not one half of a pair."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    gradients = []
    for model in (fused, eager):
        keeps = Keeps(model.get_submodule(place))
        model.set_submodule(place, keeps)
        gradients += torch.autograd.grad(model(x).square().sum(), keeps.kept)
    assert relative_error(*gradients) < 1e-9


class NormFirst(nn.Module):
    """A norm of what another branch reads after it."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        out = self.bn(x)
        return torch.relu(out + self.conv(x))


class AddsToBranch(NormFirst):
    def forward(self, x):
        out = self.conv(x)
        out += self.bn(x)
        return torch.relu(out)


@pytest.mark.parametrize(("kind", "replacement"), [(NormFirst, nn.ReLU(inplace=True)), (AddsToBranch, nn.Identity())])
@pytest.mark.parametrize("how", ["module", "hook"])
def test_replaced_by_what_lets_the_input_change(kind, replacement, how, device):
    """Where the convolution was taken for one that leaves its input alone, and whose output is its own."""
    fused, eager = fused_and_eager(kind().eval(), device)
    given = [activations(device)]
    given.append(given[0].clone())
    with torch.no_grad():
        assert relative_error(fused(given[0]), eager(given[1])) < 1e-12
        for model in (fused, eager):
            if how == "module":
                model.conv = replacement
            else:
                model.conv.register_forward_hook(lambda m, inputs, y: replacement(inputs[0]))
        assert relative_error(fused(given[0]), eager(given[1])) < 1e-12
    assert torch.equal(*given)


def test_another_head(device):
    fused, eager = fused_and_eager(ResNet(), device)
    for model in (fused, eager):
        torch.manual_seed(1)
        model.fc = nn.Linear(8, 3).to(device, torch.float64)
    x = images(device)
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
        assert_close(step(fused, x), step(eager, x), 1e-9)
    assert counted.call_count == 11


def test_twice_is_once_and_unfuse_restores(device):
    fused, eager = fused_and_eager(ResNet(), device)
    first = {name: m.__dict__["forward"].plans for name, m in fused.named_modules() if "forward" in m.__dict__}
    resfused.fuse_(fused)
    second = {name: m.__dict__["forward"].plans for name, m in fused.named_modules() if "forward" in m.__dict__}
    assert first == second
    assert is_fused(fused)
    resfused.unfuse_(fused)
    for (name, module), (_, plain) in zip(fused.named_modules(), eager.named_modules(), strict=True):
        assert module.__dict__.keys() == plain.__dict__.keys(), name
        assert type(module) is type(plain)
        assert module.forward.__func__ is type(plain).forward
    x = images(device)
    assert_close(step(fused, x), step(eager, x), 1e-12)


def test_part_of_a_model(device):
    """fuse_ of a stage, unfuse_ of one block, and norms that filter_fn refuses."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    resfused.unfuse_(fused)
    resfused.fuse_(fused.layer1)
    assert nodes(fused, x) == 2
    resfused.fuse_(fused)
    resfused.unfuse_(fused.layer2[0])
    assert nodes(fused, x) == 2
    assert_close(step(fused, x), step(eager, x), 1e-9)
    report = resfused.fuse_(fused, lambda module, name: name != "layer1.0.bn2")
    assert [entry.norm for entry in report.left] == ["layer1.0.bn2"]
    assert nodes(fused, x) == 3
    assert_close(step(fused, x), step(eager, x), 1e-9)


def test_a_subclass_that_calls_its_base(device):

    class Scaled(BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    fused, eager = fused_and_eager(nn.Sequential(BasicBlock(4, 4), Scaled(4, 4)), device)
    x = activations(device)
    assert nodes(fused, x) == 4
    assert_close(step(fused, x), step(eager, x), 1e-9)
