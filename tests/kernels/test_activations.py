"""Every activation, by the kernels alone: values, gradients from the least that is kept, and what stands at kinks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from covering import LAUNCHES, covering
from oracle import FORMS, LAYOUTS, NUMBERS, PARAMETERS, STATISTICS, TOLERANCE, problem, relative_error, run
from resfused.kernels.activation import ACTIVATIONS, Activation
from resfused.kernels.call import Gradients, Kept, Norm, to_keep
from resfused.kernels.gpu import launch_table

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
WAYS = ("frozen", *LAUNCHES, "phases")


@pytest.fixture(autouse=True)
def _exact_oracle(monkeypatch):
    monkeypatch.setitem(reference._FUNCTIONS, "hardsigmoid", hardsigmoid)


def hardsigmoid(z):
    """PyTorch's, whose gradient is in float64 too made of a float's 1/6."""
    z = z * 1
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * ((1 / 6) / float(torch.tensor(1 / 6))))
    return F.hardsigmoid(z)


def exists(form, wanted, **_):
    normed, residual = form == FORMS[2], form != FORMS[0]
    return any(residual if n == "residual" else normed or not n.startswith("residual_") for n in WANTED[wanted])


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


@covering(
    exists, form=FORMS, activation=BY_NAME, way=WAYS, wanted=WANTED, layout=LAYOUTS, forked=[False, True],
    dtype=[torch.float64, torch.float32, torch.bfloat16], shape=[(3, 9, 5, 3), (6, 5, 3, 3), (2, 17, 4, 4), (11, 10)],
)  # fmt: skip
def test_values(form, activation, way, wanted, layout, forked, dtype, shape, device, small_launches):
    """z from -12 to 12, to either side of every kink; from what ``wanted`` needs and nothing else."""
    p = problem(form, shape, dtype, device, training=way != "frozen", layout=layout)
    p = p.with_(**{n: t * 4 for n, t in p.tensors.items() if n.endswith("weight")})
    p = replace(p, activation=BY_NAME[activation], wanted=WANTED[wanted])
    nodes = launch_table.EVERY_NODE if way == "one launch" else launch_table.NO_NODE
    with launch_table.using(ONE_LAUNCH_ELEMENTS=nodes):
        check(p, ours(p, way, forked))


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


@covering(
    activation=[*EVERY, Activation("leaky_relu", -0.5), Activation("leaky_relu")],
    dtype=[torch.float64, torch.float32], dy=[1.0, float("inf")], from_bits=[False, True], form=FORMS,
)  # fmt: skip
def test_kinks_nan_and_infinity(activation, dtype, dy, from_bits, form, device):
    """A frozen norm that changes nothing; each point a channel. From z, or without x from bits alone."""
    points = POINTS + INFINITE
    x = torch.tensor([points], dtype=dtype, device=device)
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
    value, gradient = at(points, activation, dy)
    few = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y[0].cpu().double(), value, rtol=few, atol=few, equal_nan=True)
    torch.testing.assert_close(dx[0].cpu().double(), gradient, rtol=few, atol=few, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"identity", *TWO_SLOPES}))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_end_where_the_activation_ends(name, layout, device, small_launches):
    """Beyond it a tile has no values, but 0 less a mean may overflow, and so z: its gradient there is of no element."""
    p = problem(FORMS[0], (3, 5, 5, 3), torch.float32, device, training=False, layout=layout)
    p = p.with_(weight=torch.full_like(p.tensors["weight"], 1e3), running_var=torch.zeros_like(p.tensors["weight"]))
    p = replace(p, activation=BY_NAME[name])
    far, near = (
        p.with_(**{n: torch.full_like(p.tensors[n], value) for n in ("input", "running_mean")}) for value in (1e38, 0)
    )
    check(near, ours(far) | {"running_mean": near.tensors["running_mean"]})


def test_dtypes_of_what_is_not_kept(device):
    """A frozen norm's bits are all that the gradients of inputs of two dtypes are made of."""
    p = problem(FORMS[2], (3, 5, 4, 3), torch.float64, device, training=False)
    p = replace(p.with_(input=p.tensors["input"].float()), activation=BY_NAME["relu6"], wanted=INPUTS)
    found = ours(p)
    assert [found[f"gradient of {n}"].dtype for n in INPUTS] == [torch.float32, torch.float64]
    exact = run(reference, p, torch.float64)
    assert all(relative_error(found[n], exact[n]) < 1e-7 for n in exact)
    assert all(relative_error(found[n], exact[n]) < 1e-12 for n in ("output", "gradient of residual"))
