"""Nodes with any activation: by the kernels in force, from the least that they need, and by PyTorch in float64."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from oracle import FORMS, NUMBERS, PARAMETERS, STATISTICS, TOLERANCE, pre_activation, relative_error, run
from resfused.kernels.activation import ACTIVATIONS, Activation
from resfused.kernels.call import Gradients, Kept, Norm, to_keep

from resfused import reference
from resfused.backend import require_kernels

EVERY = tuple(Activation(name, 0.1 if name == "leaky_relu" else 0.0) for name in ACTIVATIONS)
BY_NAME = {activation.name: activation for activation in EVERY}
TWO_SLOPES = tuple(a.name for a in EVERY if a.slopes and a.name != "identity")
NAMES = ("input", "residual", *PARAMETERS)
INPUTS = ("input", "residual")
WANTED = {
    "everything": NAMES, "inputs": INPUTS, "input": NAMES[:1], "residual": NAMES[1:2], "biases": ("bias", NAMES[5]),
    "no input": NAMES[1:], "second weight": NAMES[4:5],
}  # fmt: skip


def hardsigmoid(z):
    """PyTorch's, whose gradient is in float64 too made of a float's 1/6."""
    z = z * 1
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * ((1 / 6) / float(torch.tensor(1 / 6))))
    return F.hardsigmoid(z)


# Where derivatives jump.
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardsigmoid": (-3, 3), "hardswish": (-3, 3)}


def exists(form, wanted, **_):
    normed, residual = form == FORMS[2], form != FORMS[0]
    return any(residual if n == "residual" else normed or not n.startswith("residual_") for n in WANTED[wanted])


def clear_of_kinks(p, width=1e-4):
    """With z on both sides of every kink, and no gradient where its rounding may decide the side."""
    p = p.with_(**{n: t * 4 for n, t in p.tensors.items() if n.endswith("weight")})
    z = pre_activation(p)
    for kink in KINKS.get(p.activation.name, ()):
        p = replace(p, dy=p.dy.where((z - kink).abs() > width, 0))
    return p


def norms_of(p):
    """Both norms, with running statistics of their own."""
    t = {n: v.clone() if n in STATISTICS else v for n, v in p.tensors.items()}

    def norm(prefix, factor):
        vectors = [t.get(f"{prefix}{n}") for n in ("weight", "bias", "running_mean", "running_var")]
        return Norm(*vectors, NUMBERS["momentum"] * factor, p.numbers["eps"] * factor)

    return t, norm("", 1.0), norm("residual_", 1.5) if p.form == FORMS[2] else None


def ours(p, way="", forked=False):
    """As ``oracle.run``, by the kernels, from what ``to_keep`` says."""
    t, norm, second = norms_of(p)
    x, residual = t["input"], t.get("residual")
    kernels = require_kernels(x)
    wanted = Gradients(*(n in p.wanted and n in t for n in NAMES))
    keep = to_keep(residual is not None, second is not None, p.training, p.activation, wanted)
    if way == "phases":
        local = kernels.local_statistics(x, residual, second is not None)
        rows = zip(local[::2], local[1::2], (norm, second), strict=False)
        values = x.numel() // x.shape[1]
        stats = torch.stack([r for mean, m2, n in rows for r in (mean, (m2 / values + n.eps).rsqrt())])
        y, mask = kernels.normalise(x, residual, stats, norm, second, keep.mask, p.activation)
    else:
        y, mask, stats = kernels.forward(x, residual, norm, second, p.training, keep.mask, p.activation)
    assert (mask is not None) == keep.mask
    kept = Kept(
        x if keep.x else None, x.dtype, residual if keep.residual else None, getattr(residual, "dtype", None),
        mask, stats, norm, second, p.activation,
    )  # fmt: skip
    dy = (p.dy * 2, -p.dy) if forked else (p.dy, None)
    if way == "phases":
        alone = wanted.residual and second is None
        sums, found = kernels.local_sums(*dy, kept, wanted._replace(x=False, residual=alone))
        assert keep.x or not sums[1].any()
        assert keep.residual or not sums[2:].any()
        inputs = wanted.x, wanted.residual and not alone
        if any(inputs):
            dx, dresidual = kernels.input_gradients(*dy, found.residual, kept, sums / values, inputs)
            found = found._replace(x=dx, residual=found.residual if alone else dresidual)
    else:
        found = kernels.backward(*dy, kept, wanted)
    gradients = {f"gradient of {n}": g for n, g in zip(NAMES, found, strict=True) if g is not None}
    return {"output": y} | gradients | ({} if way == "phases" else {n: t[n] for n in STATISTICS if n in t})


def check(p, found):
    """Within rounding of float64; in half precision no worse than twice eager."""
    dtype = p.tensors["input"].dtype
    exact = run(reference, p, torch.float64)
    assert {n for n in exact if n not in STATISTICS} == {n for n in found if n not in STATISTICS}
    eager = run(reference, p) if dtype.itemsize == 2 else None
    for name, ours in found.items():
        limit = TOLERANCE[dtype] if eager is None else 2 * relative_error(eager[name], exact[name]) + 1e-6
        assert relative_error(ours, exact[name]) <= limit, name


POINTS = (-1e30, -6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 1e30)
INFINITE = (float("inf"), -float("inf"), float("nan"))


def at(points, activation, dy):
    """PyTorch's values and gradients in float64, one element at a time: where those of many differ, GPUs do as one."""
    found = []
    for point in points:
        z = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        y = reference.activate(z, activation) + 0
        found.append((y.detach(), *torch.autograd.grad(y, z, torch.tensor(dy, dtype=torch.float64))))
    return map(torch.stack, zip(*found, strict=True))


def check_points(activation, dtype, dy, from_bits, form, device):
    """At kinks, infinities and NaN, of a frozen norm that changes nothing: each point some channels.

    From z, or without x from bits alone.
    """
    points = POINTS + INFINITE
    x = torch.tensor([points * 7], dtype=dtype, device=device)
    neutral = Norm(None, None, torch.zeros_like(x[0]), torch.ones_like(x[0]), 0.0, 0.0)
    residual = None if form == FORMS[0] else torch.zeros_like(x)
    second = neutral if form == FORMS[2] else None
    weight = torch.ones_like(x[0])
    norm = neutral if from_bits else neutral._replace(weight=weight)
    wanted = Gradients(True, False, not from_bits, False, False, False)
    keep = to_keep(residual is not None, second is not None, False, activation, wanted)
    kernels = require_kernels(x)
    y, mask, _ = kernels.forward(x, residual, norm, second, False, keep.mask, activation)
    kept = Kept(
        x if keep.x else None, dtype, residual if keep.residual else None, dtype, mask, None, norm, second, activation
    )
    dx = kernels.backward(torch.full_like(x, dy), None, kept, wanted).x
    value, gradient = (found.repeat(7) for found in at(points, activation, dy))
    few = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y[0].cpu().double(), value, rtol=few, atol=few, equal_nan=True)
    torch.testing.assert_close(dx[0].cpu().double(), gradient, rtol=few, atol=few, equal_nan=True)
