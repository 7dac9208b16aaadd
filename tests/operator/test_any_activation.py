"""Activations other than the ReLU: values and gradients, and what is kept for a backward, beside PyTorch's own."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from count.node_passes import kept_by
from covering import covering
from oracle import FORMS, LAYOUTS, PARAMETERS, TOLERANCE, assert_close, call, problem, run
from resfused.kernels.activation import ACTIVATIONS, RELU, Activation, activation_of
from torch import nn

import resfused
import resfused.functional as fused
from resfused import reference

EACH = [activation_of(name, 0.2) for name in ACTIVATIONS]
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


def tolerance(activation, dtype):
    """PyTorch's derivative of hardsigmoid is a sixth as float32 has it, in float64 too."""
    return max(TOLERANCE[dtype], 1e-7 if activation.name == "hardsigmoid" else 0)


def names(p):
    return [n for n in ("input", "residual", *PARAMETERS) if n in p.tensors]


@covering(activation=EACH, form=FORMS, training=[True, False], layout=LAYOUTS, dtype=[torch.float64, torch.float32])
def test_values_and_gradients(activation, form, training, layout, dtype, device):
    p = replace(problem(form, (4, 9, 3, 5), dtype, device, training=training, layout=layout), activation=activation)
    assert_close(run(fused, p), run(reference, p, torch.float64), tolerance(activation, dtype))


@covering(activation=EACH, training=[True, False], wanted=["input", "residual", "weight", "bias", "residual_weight"])
def test_one_gradient_alone(activation, training, wanted, device, in_cpp):
    """Little is kept for it, and what is not kept is not missed."""
    for form in FORMS:
        p = replace(problem(form, (4, 9, 3, 5), torch.float64, device, training=training), activation=activation)
        if wanted in p.tensors:
            p = replace(p, wanted=(wanted,))
            assert_close(run(fused, p), run(reference, p), tolerance(activation, torch.float64))


@covering(activation=EACH, form=FORMS, training=[True, False])
def test_gradients_that_lie_otherwise(activation, form, training, device, in_cpp):
    """The output's gradient in the other layout than x, which may not have been kept."""
    p = problem(form, (4, 9, 3, 5), torch.float64, device, training=training, layout="channels_last")
    for wanted in (("input", "residual"), ("input", "weight")):
        q = replace(p, activation=activation, dy=p.dy.contiguous(), wanted=wanted)
        assert_close(run(fused, q), run(reference, q), tolerance(activation, torch.float64))


@covering(activation=EACH, form=FORMS, training=[True, False])
def test_derivatives_by_differences(activation, form, training, device, in_cpp):
    p = replace(problem(form, (3, 2, 2, 1), torch.float64, device, training=training), activation=activation)
    stats = {n: t for n, t in p.tensors.items() if "running" in n and not training}
    leaves = [p.tensors[n].requires_grad_() for n in names(p)]

    def function(*values):
        return call(fused, p, {**stats, **dict(zip(names(p), values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_at_the_kinks(activation, device, in_cpp):
    """z itself is what a norm of mean 0, variance 1 and no eps is given; dy is such that 0·inf would show.

    Of NaN PyTorch's own gradients of relu6 and hardswish are others on a CPU than on a GPU.
    """
    z = torch.tensor([-torch.inf, -7, -3.0, -1, -0.0, 0.0, 1, 3.0, 6.0, 7, torch.inf, torch.nan], dtype=torch.float64)
    if activation.name in ("relu6", "hardswish"):
        z = z[:-1]
    for dy in (1.5, torch.inf):
        found = []
        for library in (fused, reference):
            x = z.to(device).repeat(2, 1).T[None].contiguous().movedim(1, 2).contiguous().requires_grad_()
            stats = torch.zeros(2, dtype=x.dtype, device=device), torch.ones(2, dtype=x.dtype, device=device)
            y = library.batch_norm_act(x, *stats, eps=0.0, activation=activation)
            (dx,) = torch.autograd.grad(y, x, torch.full_like(y, dy))
            found.append((y.detach(), dx))
        for ours, theirs in zip(*found, strict=True):
            near = tolerance(activation, torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=near, atol=near, equal_nan=True)


def kept(library, p):
    t = {n: v.detach().clone().requires_grad_(n in p.wanted) if v is not None else None for n, v in p.tensors.items()}
    return kept_by(lambda: call(library, p, t))


# Of the bytes of one activation; a mask is a 32nd in float32.
BIT = 1 / 32
KEPT = {
    # form, whether the derivative needs bits, z or nothing: in training; frozen, without parameters' gradients
    ("norm+relu", "nothing"): (1, 0),
    ("norm+relu", "bits"): (1, BIT),
    ("norm+relu", "z"): (1, 1),
    ("norm+add+relu", "nothing"): (1, 0),
    ("norm+add+relu", "bits"): (1 + BIT, BIT),
    ("norm+add+relu", "z"): (2, 1),
    ("norm+add(norm)+relu", "nothing"): (2, 0),
    ("norm+add(norm)+relu", "bits"): (2, BIT),
    ("norm+add(norm)+relu", "z"): (2, 1),
}


@MODES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", EACH, ids=str)
def test_what_is_kept(activation, form, training, device, in_cpp):
    """The least, and never more than eager keeps, which of a sigmoid keeps what its consumer keeps too."""
    p = problem(form, (4, 8, 4, 8), torch.float32, device, training=training)
    p = replace(p, activation=activation, wanted=p.wanted if training else ("input", "residual"))
    needs = "nothing" if activation.name == "identity" else "z" if activation.slopes is None else "bits"
    ours = kept(fused, p)
    if activation.name == "sigmoid" and not training and form != FORMS[0]:
        # PyTorch's own, of the sum: it keeps the output alone.
        needs = "nothing"
    assert ours == KEPT[form, needs][not training]
    if activation.name != "sigmoid":
        assert ours <= kept(reference, p) + (BIT if needs == "bits" else 0)


@pytest.mark.parametrize("form", FORMS)
@MODES
def test_what_is_kept_for_a_gradient_alone(form, training, device, in_cpp):
    """x for its weight's or in training its own; a residual that needs none is not kept."""
    p = problem(form, (4, 8, 4, 8), torch.float32, device, training=training)
    two, alone = form == FORMS[2], form == FORMS[1]
    expected = {
        "input": 1 + BIT * (form != FORMS[0]) if training else BIT,
        "weight": 1 + BIT * (form != FORMS[0]),
        "bias": BIT,
        "residual": (1 + BIT if training and two else BIT) if two or alone else 0,
        "residual_weight": 1 + BIT if two else 0,
    }
    for name, size in expected.items():
        assert kept(fused, replace(p, wanted=(name,))) == size, name


NORMS = {
    "BatchNormAct1d": (4, 3, 5),
    "BatchNormAct2d": (4, 3, 5, 2),
    "BatchNormAct3d": (4, 3, 5, 2, 2),
    "SyncBatchNormAct": (4, 3, 5),
}


@pytest.mark.parametrize("name", NORMS)
def test_modules(name, device, in_cpp):
    """As PyTorch's norm and activation one after the other: values, gradients, state, copies."""
    for added, activation in ((False, Activation("silu")), (True, Activation("leaky_relu", 0.3))):
        ours = getattr(resfused, name.replace("Act", "AddAct") if added else name)(
            3, eps=0.1, momentum=0.4, activation=activation.name, negative_slope=0.3, device=device, dtype=torch.float64
        )
        plain = getattr(nn, name.replace("Act", "") if "Sync" not in name else "BatchNorm1d")(
            3, eps=0.1, momentum=0.4, device=device, dtype=torch.float64
        )
        plain.load_state_dict(ours.state_dict())
        ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        for training in (True, False):
            ours.train(training)
            plain.train(training)
            x, residual = (torch.randn(NORMS[name], dtype=torch.float64, device=device) for _ in range(2))
            found = []
            for norm in (ours, plain):
                a = x.clone().requires_grad_()
                if norm is ours:
                    y = norm(a, residual) if added else norm(a)
                else:
                    y = reference.activate(norm(a) + residual if added else norm(a), activation)
                y.square().sum().backward()
                found.append({"y": y, "dx": a.grad, **{n: p.grad.clone() for n, p in norm.named_parameters()}})
                norm.zero_grad()
            assert_close(*found, 1e-12)
        assert_close(dict(ours.state_dict()), dict(plain.state_dict()), 1e-12)
        assert f"activation={activation.name}" in repr(ours)


def test_conversion_keeps_the_activation():
    model = nn.Sequential(resfused.BatchNormAct2d(3, activation="gelu", approximate="tanh"), nn.BatchNorm2d(3))
    model.append(resfused.BatchNormAddAct2d(3, activation="relu6"))
    converted = resfused.convert_sync_batchnorm(model)
    assert [type(m).__name__ for m in converted] == ["SyncBatchNormAct", "SyncBatchNorm", "SyncBatchNormAddAct"]
    assert converted[0].activation == Activation("gelu_tanh")
    assert converted[2].activation == Activation("relu6")


@pytest.mark.parametrize("activation", [a for a in EACH if a != RELU], ids=str)
def test_tail(activation, device, in_cpp):
    """Of modules, counted once, with either residual."""
    for form in FORMS:
        p = replace(problem(form, (4, 3, 2, 3), torch.float64, device), activation=activation)
        norms = [nn.BatchNorm2d(3, dtype=torch.float64, device=device) for _ in range(2)]
        plain = copy.deepcopy(norms)
        x, residual = p.tensors["input"], p.tensors.get("residual")
        second = 1 if form == FORMS[2] else None
        y = resfused.tail(norms[0], x, residual, second and norms[1], activation)
        z = plain[0](x)
        if residual is not None:
            z = z + (plain[1](residual) if second else residual)
        torch.testing.assert_close(y, reference.activate(z, activation), rtol=1e-12, atol=1e-12)
        assert [n.num_batches_tracked for n in norms] == [n.num_batches_tracked for n in plain]


def test_bad_arguments(device):
    x, stats = torch.randn(2, 3, 4, device=device), (torch.zeros(3, device=device), torch.ones(3, device=device))
    for arguments, error, message in (
        ({"activation": "mish"}, ValueError, "activation must be one of identity, .* but got 'mish'"),
        ({"activation": nn.SiLU()}, TypeError, "activation must be a str or an Activation, but got SiLU"),
        ({"activation": "leaky_relu", "negative_slope": "0.1"}, TypeError, "negative_slope must be a number"),
        ({"activation": "gelu", "approximate": "erf"}, ValueError, "approximate must be 'none' or 'tanh'"),
        ({"residual": 1.0}, TypeError, "residual must be a Tensor, but got float"),
    ):
        with pytest.raises(error, match=message):
            fused.batch_norm_act(x, *stats, training=True, **arguments)
        if "residual" not in arguments:
            with pytest.raises(error, match=message):
                resfused.BatchNormAct1d(3, **arguments)
    assert not stats[0].any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, device):
    """One graph, the same numbers, in training and frozen without parameters' gradients."""
    torch._dynamo.reset()
    norm = resfused.BatchNormAct2d(3, activation="silu", device=device, dtype=torch.float64)
    added = resfused.BatchNormAddAct2d(3, activation="identity", device=device, dtype=torch.float64)

    def step(x):
        return added(norm(x), x).square()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for training in (True, False):
        for module in (norm, added):
            module.train(training).requires_grad_(training)
        found = []
        for function in (step, compiled):
            state = copy.deepcopy((norm.state_dict(), added.state_dict()))
            x = torch.linspace(-3, 3, 72, dtype=torch.float64, device=device).view(4, 3, 3, 2).requires_grad_()
            y = function(x)
            y.sum().backward()
            found.append({"y": y, "dx": x.grad, "mean": norm.running_mean.clone()})
            norm.load_state_dict(state[0])
            added.load_state_dict(state[1])
        assert_close(*found, 1e-12)
