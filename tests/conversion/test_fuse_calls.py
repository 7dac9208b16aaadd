"""Modules that are called with more than tensors: what is fused for each call, and that it runs."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from parts import ADD, CHANNELS, RELU, Parts, forms, fused_like_plain
from torch import nn

import resfused
from resfused.conversion.fused_forward import MOST_CALLS, FusedForward


class Tail(Parts):
    def __init__(self, code):
        super().__init__(code, nn.ReLU())


def takes_a_list(self, input):
    """As torchvision's _DenseLayer: a tensor or a list of tensors."""
    features = [input] if isinstance(input, torch.Tensor) else input
    return F.relu(self.a(sum(features[1:], features[0])))


def takes_a_shortcut(self, x, shortcut=None):
    """As timm's DlaBottleneck."""
    if shortcut is None:
        shortcut = x
    return F.relu(self.a(x) + shortcut)


def takes_a_dict(self, batch):
    return F.relu(self.a(batch["image"]))


def takes_more(self, x, **named):
    return F.relu(self.a(x)) * named.get("scale", 1)


def takes_any(self, *xs):
    return F.relu(self.a(xs[0]) + xs[-1])


def takes_a_name(self, x, *, relu=True):
    return F.relu(self.a(x)) if relu else self.a(x)


def must_be_named(self, x, *, scale):
    return F.relu(self.a(x)) * scale


CALLS = {
    "a list": (takes_a_list, RELU, lambda m, x: m([x, x * 2])),
    "a tuple": (takes_a_list, RELU, lambda m, x: m((x, x * 2, x))),
    "a tensor, where lists are taken": (takes_a_list, RELU, lambda m, x: m(x)),
    "an optional argument": (takes_a_shortcut, ADD, lambda m, x: m(x, x * 2)),
    "an optional argument by name": (takes_a_shortcut, ADD, lambda m, x: m(shortcut=x * 2, x=x)),
    "the same tensor twice": (takes_a_shortcut, ADD, lambda m, x: m(x, x)),
    "None": (takes_a_shortcut, ADD, lambda m, x: m(x, None)),
    "a dict": (takes_a_dict, RELU, lambda m, x: m({"image": x, "label": "cat"})),
    "a named argument": (takes_more, RELU, lambda m, x: m(x, scale=3)),
    "a named tensor": (takes_more, RELU, lambda m, x: m(x, scale=x)),
    "any number": (takes_any, ADD, lambda m, x: m(x, 2 * x)),
    "a number that must be named": (must_be_named, RELU, lambda m, x: m(x, scale=2)),
    "a default by name": (takes_a_name, RELU, lambda m, x: m(x, relu=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_more_than_tensors_runs_fused(name, device):
    """Called so by a script, and by another module, whose code says how."""
    code, form, call = CALLS[name]
    for model in (Tail(code), Caller(code, call)):
        report = fused_like_plain(model, device, call=call if isinstance(model, Tail) else alone)
        assert report.fused or isinstance(model, Tail)
        x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
        if isinstance(model, Caller):
            assert forms(report) == [form]
            assert report.check(model, x).places == (1, 1)
        else:
            found = []
            with resfused.use_backend("torch"):
                for training in (True, False):
                    found.append(ran(model.train(training), lambda model: call(model, x)))  # noqa: B023
            assert found == [1, 1]


def alone(model, x):
    return model(x)


class Caller(nn.Module):
    """Calls a module as its own code says."""

    def __init__(self, code, call):
        super().__init__()
        self.tail = Tail(code)
        self.__class__ = type("Caller", (Caller,), {"forward": lambda self, x: call(self.tail, x)})


def ran(model, call):
    """How many fused operations a call has."""
    from resfused.operator import dispatch

    plain, number = dispatch._plain, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_plain", lambda *args: (number.append(1), plain(*args))[1])
        call(model)
    return len(number)


def test_each_value_of_an_argument_has_its_own_code(device):
    """The argument decides what is computed, and is no tensor: a switch, a number, a text."""

    def code(self, x, switch="on", factor=1.0):
        if switch == "off":
            return self.a(x) * factor
        return F.relu(self.a(x)) * factor

    model = Tail(code).to(device, torch.float64)
    plain = copy.deepcopy(model)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    assert resfused.fuse_(model).norms == ("bn1",)
    for given in ((), ("on",), ("off",), ("off", 2.0), ("on", 3), ("on", 3.0), ("on", True)):
        assert relative_error(model(x, *given), plain(x, *given)) < 1e-12, given


def test_a_number_that_changes_from_call_to_call(device):
    """Is planned for some times, and computed as it is from then on."""

    def code(self, x, step):
        return F.relu(self.a(x)) + step

    model = Tail(code).to(device, torch.float64)
    plain = copy.deepcopy(model)
    resfused.fuse_(model)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for step in range(2 * MOST_CALLS):
        assert relative_error(model(x, step), plain(x, step)) < 1e-12
    assert len(model.forward.plans) == MOST_CALLS


@pytest.mark.parametrize("known", [False, True])
def test_a_call_in_compiled_code(known, device):
    """One that was made before compiles fused, another as it is; without a break in the graph."""
    model = Tail(takes_a_shortcut).to(device, torch.float64)
    plain = copy.deepcopy(model)
    resfused.fuse_(model)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    if known:
        for each in (model, plain):
            each(x, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with resfused.use_backend("torch"):
        assert ran(model, lambda _: relative_error(compiled(x, 2 * x), plain(x, 2 * x)) < 1e-12) == known
    assert len(model.forward.plans) == 1 + known


def test_a_call_in_another_thread(device):
    """Is not planned: PyTorch is patched for it, for all threads."""
    model = Tail(takes_a_shortcut).to(device, torch.float64)
    plain = copy.deepcopy(model)
    resfused.fuse_(model)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    with ThreadPoolExecutor(1) as pool:
        assert relative_error(pool.submit(model, x, 2 * x).result(), plain(x, 2 * x)) < 1e-12
    assert len(model.forward.plans) == 1


class Unknown:
    def __init__(self, x):
        self.x = x


def test_what_cannot_be_told_apart_runs_as_it_is(device):
    def code(self, given):
        return F.relu(self.a(given.x if isinstance(given, Unknown) else given))

    model = Tail(code)
    fused_like_plain(model, device, call=lambda m, x: m(Unknown(x)))
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    report = resfused.fuse_(model)
    assert report.check(model, x).idle == ()
    (each, _) = report.check(model, Unknown(x)).idle
    assert "neither a tensor nor" in each.reason


def test_a_list_that_the_code_changes_is_changed(device):
    def code(self, xs):
        xs.append(F.relu(self.a(xs[0])))
        return xs[-1]

    model = Tail(code).to(device, torch.float64)
    resfused.fuse_(model)
    xs = [torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)]
    y = model(xs)
    assert xs[1] is y


def test_a_list_that_the_code_returns_is_the_same(device):
    def code(self, xs):
        return xs, F.relu(self.a(xs[0]))

    model = Tail(code).to(device, torch.float64)
    resfused.fuse_(model)
    xs = [torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)]
    assert model(xs)[0] is xs


def test_arguments_that_are_missing_are_errors_as_before(device):
    model = Tail(takes_a_shortcut).to(device)
    resfused.fuse_(model)
    x = torch.randn(2, CHANNELS, 4, 4, device=device)
    for args, named in (((), {}), ((x, x, x), {}), ((x,), {"other": x})):
        with pytest.raises(TypeError, match="argument"):
            model(*args, **named)


def test_a_new_call_keeps_to_the_filter(device):
    """What filter_fn refused is refused for calls that fuse_ did not know of too, in copies as well."""

    def code(self, x, shortcut=None):
        return F.relu(self.a(x)) + F.relu(self.b(x)) + (0 if shortcut is None else shortcut)

    model = Tail(code).to(device, torch.float64)
    resfused.fuse_(model, lambda module, name: name != "bn1")
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    with resfused.use_backend("torch"):
        assert ran(copy.deepcopy(model), lambda model: model(x, x)) == 1
    assert isinstance(model.forward, FusedForward)
