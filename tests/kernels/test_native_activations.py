"""The kernels in C++ with every activation, from the least that is kept, against PyTorch in float64."""

from dataclasses import replace

import pytest
import torch
from activation_cases import (
    EAGER,
    INFINITE,
    KINKS,
    NAMES,
    POINTS,
    WANTED,
    activation,
    assert_accurate,
    check,
    check_points,
    expected,
    found,
    least_kept,
    norms_of,
    pre_activation,
    spread,
    wanted_of,
)
from covering import covering
from oracle import FORMS, LAYOUTS, PARAMETERS, STATISTICS, assert_close, problem
from resfused.kernels import cpu
from resfused.kernels.activation import ACTIVATIONS, IDENTITY
from resfused.kernels.cpu import functions

CPU = torch.device("cpu")
OTHERS = tuple(name for name in ACTIVATIONS if name != "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows to the last of a pack and in one part, planes by columns, in pieces, and one by one.
SHAPES = ((33, 3), (70, 72), (8, 24, 6, 4), (5, 3, 7, 7), (2, 3, 50, 90), (2, 17, 5, 3))
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WIDTH = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def has_residual(form, wanted, **_):
    return form != FORMS[0] or wanted != "residual"


@covering(
    has_residual,
    together=("name", "form", "wanted"),
    name=ACTIVATIONS,
    form=FORMS,
    wanted=list(WANTED),
    training=(True, False),
    layout=LAYOUTS,
    dtype=DTYPES,
    shape=SHAPES,
    forked=(False, True),
)
def test_values_and_gradients(name, form, wanted, training, layout, dtype, shape, forked):
    p = spread(problem(form, shape, dtype, CPU, training=training, layout=layout), name, WIDTH[dtype])
    check(p, name, WANTED[wanted], forked, TOLERANCE[dtype])


@covering(
    name=ACTIVATIONS,
    of_input=DTYPES,
    of_residual=DTYPES,
    form=FORMS[1:],
    training=(True, False),
    wanted=("all", "activations", "residual"),
    layout=LAYOUTS,
)
def test_any_two_dtypes(name, of_input, of_residual, form, training, wanted, layout):
    p = problem(form, (3, 21, 5, 7), torch.float64, CPU, training=training, layout=layout)

    def own(n, tensor):
        dtype = of_residual if n.startswith("residual") else of_input
        return tensor.to(torch.promote_types(dtype, torch.float32) if tensor.dim() == 1 else dtype)

    p = p.with_(**{n: own(n, t) for n, t in p.tensors.items()})
    p = spread(replace(p, dy=p.dy.to(torch.promote_types(of_input, of_residual))), name, 1e-4)
    check(p, name, WANTED[wanted], False, max(TOLERANCE[of_input], TOLERANCE[of_residual]))


@covering(
    name=ACTIVATIONS, dtype=DTYPES, dy=(1.0, -2.0, INFINITE), masked=(False, True), columns=(False, True),
    valid=lambda name, masked, **_: not masked or (name in KINKS and name != "hardswish"),
)  # fmt: skip
def test_kinks_and_no_numbers(name, dtype, dy, masked, columns):
    check_points(name, dtype, dy, masked, columns)


def test_kinks_of_the_oracle():
    """Where the oracle is a formula of ours it is PyTorch's function."""
    z = torch.tensor(POINTS, dtype=torch.float64)
    torch.testing.assert_close(EAGER["hardsigmoid"](z), torch.nn.functional.hardsigmoid(z), equal_nan=True)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.hardsigmoid(z).sum(), z)
    exact = torch.tensor([1 / 6 if abs(point) < 3 else 0 for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(slope, exact, rtol=1e-7, atol=0)


def test_smooth_to_a_few_roundings():
    assert_accurate()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_is_the_norm_alone(layout):
    """Bit by bit: dx = weight·rstd·dy, and the residual's gradient is dy."""
    p = problem(FORMS[1], (3, 21, 5, 7), torch.float32, CPU, training=False, layout=layout)
    gradients = found(p, "identity", ("input", "residual"))
    rstd = (p.tensors["running_var"].double() + p.numbers["eps"]).rsqrt().float()
    assert torch.equal(gradients["gradient of input"], p.dy * (p.tensors["weight"] * rstd).view(-1, 1, 1))
    assert torch.equal(gradients["gradient of residual"], p.dy)


@covering(name=("relu6", "hardswish", "silu", "gelu", "identity"), form=FORMS, layout=LAYOUTS,
          shape=((16, 64, 28, 28), (32, 40, 7, 7), (5000, 30)), dtype=DTYPES[:2], forked=(False, True))  # fmt: skip
def test_same_bits_whatever_the_threads(name, form, layout, shape, dtype, forked):
    p = problem(form, shape, dtype, CPU, layout=layout)
    wanted = tuple(n for n in NAMES if n in p.tensors)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(found(p, name, wanted, forked))
    for other in results[1:]:
        assert all(torch.equal(other[n], results[0][n]) for n in other)


@covering(name=("relu", "relu6", "leaky_relu", "silu", "identity"), form=FORMS, layout=LAYOUTS, training=(True, False),
          wanted=("all", "activations"), shape=((3, 5, 130, 101), (32, 48, 7, 7), (70, 72, 3, 8)))  # fmt: skip
def test_stores_past_the_caches(name, form, layout, training, wanted, shape, monkeypatch):
    monkeypatch.setattr(functions, "_caches", lambda: (2**18, 0))
    p = spread(problem(form, shape, torch.float32, CPU, training=training, layout=layout), name, 1e-4)
    check(p, name, WANTED[wanted], False, 5e-6)


@covering(
    has_residual,
    name=ACTIVATIONS,
    form=FORMS,
    layout=LAYOUTS,
    dtype=(torch.float64, torch.float32),
    forked=(False, True),
    wanted=("all", "residual", "biases and input"),
    shape=((3, 21, 5, 7), (8, 24, 6, 4)),
)
def test_phases_alone(name, form, layout, dtype, forked, wanted, shape):
    """As over several processes: together they are a training node, and what was not kept has no sum."""
    p = spread(problem(form, shape, dtype, CPU, layout=layout), name, WIDTH[dtype])
    names = tuple(n for n in WANTED[wanted] if n in p.tensors)
    exact = expected(p, name, names)
    t = {n: v for n, v in p.tensors.items() if n not in STATISTICS}
    norms, values = norms_of(p, t), p.dy.numel() // p.dy.shape[1]
    local = cpu.local_statistics(t["input"], t.get("residual"), norms[1] is not None)
    stats = local.clone()
    stats[1::2] = (local[1::2] / values + p.numbers["eps"]).rsqrt()
    whole = least_kept(p, name, wanted_of(names), t, norms, torch.empty(0), stats)
    y, mask = cpu.normalise(t["input"], t.get("residual"), stats, *norms, whole.mask is not None, activation(name))
    kept = whole._replace(mask=mask)
    halves = (p.dy * 0.25, p.dy * 0.75) if forked else (p.dy, None)
    two = norms[1] is not None
    now = wanted_of([n for n in names if n in PARAMETERS or (n == "residual" and not two)])
    sums, gradients = cpu.local_sums(*halves, kept, now)
    assert kept.x is not None or not sums[1].any()
    assert not two or kept.residual is not None or not sums[2].any()
    waiting = ("input" in names, two and "residual" in names)
    dx, dresidual = cpu.input_gradients(*halves, gradients.residual, kept, sums / values, waiting)
    ours = gradients._replace(x=dx, residual=gradients.residual if dresidual is None else dresidual)
    results = {f"gradient of {n}": g for n, g in zip(NAMES, ours, strict=True) if g is not None}
    assert_close({"output": y, **results}, {n: v for n, v in exact.items() if n not in STATISTICS}, TOLERANCE[dtype])


def test_a_mask_says_where_the_derivative_has_its_first_value():
    p = problem(FORMS[2], (3, 21, 5, 7), torch.float64, CPU, training=False)
    p = p.with_(weight=p.tensors["weight"] * 8)
    z = pre_activation(p, p.tensors)
    inside = {"relu": z > 0, "relu6": (z > 0) & (z < 6), "leaky_relu": z > 0, "hardsigmoid": (z > -3) & (z < 3)}
    norms = norms_of(p, p.tensors)
    for name, bits in inside.items():
        x, residual = p.tensors["input"], p.tensors["residual"]
        _, mask, _ = cpu.forward(x, residual, *norms, False, True, activation(name))
        assert torch.equal(cpu.unpack_mask(mask, x), bits), name


def test_nothing_stands_for_what_a_derivative_is_made_of():
    """A smooth activation without x, or any without x and mask, is a mistake of the caller's."""
    p = problem(FORMS[0], (3, 4), torch.float32, CPU, training=False)
    norm, _ = norms_of(p, p.tensors)
    kept = cpu.Kept(None, torch.float32, None, None, None, None, norm, None)
    for name in OTHERS:
        other = kept._replace(activation=activation(name))
        if other.activation == IDENTITY:
            cpu.backward(p.dy, None, other, wanted_of(("input",)))
            continue
        with pytest.raises(AssertionError):
            cpu.backward(p.dy, None, other, wanted_of(("input",)))
