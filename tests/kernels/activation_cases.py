"""Nodes with any activation: by PyTorch in float64, and by the kernels in C++ from the least that they can do with."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from oracle import FORMS, PARAMETERS, STATISTICS, assert_close
from resfused.kernels import cpu
from resfused.kernels.activation import Activation
from resfused.kernels.call import to_keep

EAGER = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    # PyTorch's own takes a sixth in float32 for its derivative, of float64 too.
    "hardsigmoid": lambda z: (z + 3).clamp(0, 6) / 6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
# Where derivatives jump.
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardsigmoid": (-3, 3), "hardswish": (-3, 3)}
NAMES = ("input", "residual", *PARAMETERS)
# Of gradients: what decides what is kept.
WANTED = {
    "all": NAMES,
    "input": ("input",),
    "residual": ("residual",),
    "activations": ("input", "residual"),
    "parameters": PARAMETERS,
    "biases and input": ("bias", "residual_bias", "input"),
}
INFINITE = float("inf")
POINTS = (-INFINITE, -6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, INFINITE, float("nan"))


def activation(name):
    return Activation(name, 0.2 if name == "leaky_relu" else 0.0)


def pre_activation(p, t):
    """norm(x) + s by PyTorch's operators, which update the running statistics among ``t``."""

    def norm(x, prefix):
        vectors = [t.get(f"{prefix}{n}") for n in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *vectors, p.training, **p.numbers)

    z = norm(t["input"], "")
    if p.form == FORMS[0]:
        return z
    return z + (t["residual"] if p.form == FORMS[1] else norm(t["residual"], "residual_"))


def spread(p, name, width):
    """The same with z on both sides of all kinks, and no gradient where its rounding may decide the side."""
    p = p.with_(weight=p.tensors["weight"] * 4)
    z = pre_activation(p, {n: t.double() for n, t in p.tensors.items()})
    for kink in KINKS.get(name, ()):
        p = replace(p, dy=p.dy.where((z - kink).abs() > width, 0))
    return p


def expected(p, name, wanted):
    """Output, running statistics and ``wanted`` gradients in float64."""
    t = {n: v.detach().double().requires_grad_(n in wanted) for n, v in p.tensors.items()}
    y = EAGER[name](pre_activation(p, t))
    gradients = torch.autograd.grad(y, [t[n] for n in wanted], p.dy.double()) if wanted else ()
    found = {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {"output": y.detach(), **found, **{n: t[n] for n in STATISTICS if n in t}}


def norms_of(p, t):
    def norm(prefix):
        vectors = [t.get(f"{prefix}{n}") for n in ("weight", "bias", "running_mean", "running_var")]
        return cpu.Norm(*vectors, p.numbers["momentum"], p.numbers["eps"])

    return norm(""), norm("residual_") if p.form == FORMS[2] else None


def least_kept(p, name, wanted, t, norms, mask, stats):
    """What ``to_keep`` says of a forward, whose mask was made if that asks for it."""
    keep = to_keep("residual" in t, norms[1] is not None, p.training, activation(name), wanted)
    x, residual = t["input"], t.get("residual")
    return cpu.Kept(
        x if keep.x else None,
        x.dtype,
        residual if keep.residual else None,
        None if residual is None else residual.dtype,
        mask if keep.mask else None,
        stats,
        *norms,
        activation(name),
    )


def wanted_of(names):
    return cpu.Gradients(*(n in names for n in NAMES))


def found(p, name, wanted, forked=False):
    """The same by the kernels; with ``forked`` of dy in two halves."""
    t = {n: v.clone() if n in STATISTICS else v for n, v in p.tensors.items()}
    norms = norms_of(p, t)
    keep = to_keep("residual" in t, norms[1] is not None, p.training, activation(name), wanted_of(wanted))
    y, mask, stats = cpu.forward(t["input"], t.get("residual"), *norms, p.training, keep.mask, activation(name))
    assert (mask is not None) == keep.mask
    kept = least_kept(p, name, wanted_of(wanted), t, norms, mask, stats)
    dy = p.dy.to(y.dtype)
    halves = (dy * 0.25, dy * 0.75) if forked else (dy, None)
    gradients = cpu.backward(*halves, kept, wanted_of(wanted))
    results = {f"gradient of {n}": g for n, g in zip(NAMES, gradients, strict=True) if g is not None}
    for n in wanted:
        assert results[f"gradient of {n}"].dtype is t[n].dtype, n
    return {"output": y, **results, **{n: t[n] for n in STATISTICS if n in t}}


def check(p, name, wanted, forked, tolerance):
    """The kernels against PyTorch; ``wanted`` of what the form has."""
    wanted = tuple(n for n in wanted if n in p.tensors)
    assert_close(found(p, name, wanted, forked), expected(p, name, wanted), tolerance)


def at_points(name, values, dy, masked, columns):
    """y, and the gradient of z, where z is exactly as given: each value once, in a channel of its own or all in one."""
    x = values.view(1, -1) if columns else values.view(1, 1, -1)
    one = torch.ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    norm = cpu.Norm(None, None, one * 0, one, 0.0, 0.0)
    y, mask, _ = cpu.forward(x, None, norm, None, False, masked, activation(name))
    kept = cpu.Kept(None if masked else x, x.dtype, None, None, mask, None, norm, None, activation(name))
    dx = cpu.backward(torch.full_like(x, dy), None, kept, wanted_of(("input",))).x
    return y.view(-1), dx.view(-1)


def check_points(name, dtype, dy, masked, columns):
    """Each of the points, alone in eager: its loops over packs and over what is left of them differ at NaN."""
    y, dx = [], []
    for point in POINTS:
        z = torch.tensor([point], dtype=torch.float64, requires_grad=True)
        y.append(EAGER[name](z))
        dx += torch.autograd.grad(y[-1], z, torch.tensor([dy], dtype=torch.float64))
    if name == "hardsigmoid":
        # PyTorch's derivative is 0 where a clamp's is not: at the kinks, and at NaN.
        dx = [d if abs(point) < 3 else torch.zeros_like(d) for d, point in zip(dx, POINTS, strict=True)]
    # In whole packs and beyond the last.
    found_y, found_dx = at_points(name, torch.tensor(POINTS, dtype=dtype).repeat(7), dy, masked, columns)
    unit = torch.finfo(dtype).eps
    for ours, exact in ((found_y, y), (found_dx, dx)):
        exact = torch.cat(exact).detach().repeat(7)
        torch.testing.assert_close(ours.double(), exact, rtol=2 * unit, atol=2 * unit, equal_nan=True)


def assert_accurate():
    """Values and derivatives of the smooth activations to a few roundings, from where they vanish to where they end."""
    z = torch.cat([torch.linspace(-110, 110, 100_003), torch.linspace(-6, 6, 100_003), torch.logspace(-30, 0, 999)])
    exact = z.double().requires_grad_()
    a, eps = z.double().abs(), torch.finfo(torch.float32).eps
    for name in ("silu", "sigmoid", "gelu", "gelu_tanh"):
        y = EAGER[name](exact)
        (slope,) = torch.autograd.grad(y.sum(), exact)
        found_y, found_slope = at_points(name, z, 1.0, False, True)
        # Of gelu z times a probability, whose own rounding counts where it is small.
        room = y.detach().abs() if name in ("silu", "sigmoid") else a * (y.detach() / z).abs().clamp(min=0.5)
        least = 3e-45 * a.clamp(min=1)
        wrong = (found_y.double() - y.detach()).abs() > 3 * eps * room + least
        assert not wrong.any(), (name, z[wrong])
        wrong = (found_slope.double() - slope).abs() > 3 * eps
        assert not wrong.any(), (name, z[wrong])
