"""Every activation, by the kernels alone: values, gradients from the least that is kept, and what stands at kinks."""

from dataclasses import replace

import pytest
import torch
from activation_cases import (
    BY_NAME,
    EVERY,
    INPUTS,
    TWO_SLOPES,
    WANTED,
    check,
    check_points,
    exists,
    hardsigmoid,
    ours,
)
from covering import LAUNCHES, covering
from oracle import FORMS, LAYOUTS, problem, relative_error, run
from resfused.kernels.activation import Activation
from resfused.kernels.gpu import launch_table

from resfused import reference

WAYS = ("frozen", *LAUNCHES, "phases")


@pytest.fixture(autouse=True)
def _exact_oracle(monkeypatch):
    monkeypatch.setitem(reference._FUNCTIONS, "hardsigmoid", hardsigmoid)


@covering(
    exists, form=FORMS, activation=BY_NAME, way=WAYS, wanted=WANTED, layout=LAYOUTS, forked=[False, True],
    dtype=[torch.float64, torch.float32, torch.bfloat16], shape=[(3, 9, 5, 3), (6, 5, 3, 3), (2, 17, 4, 4), (11, 10)],
)  # fmt: skip
def test_values_of_activations(form, activation, way, wanted, layout, forked, dtype, shape, device, small_launches):
    """z from -12 to 12, to either side of every kink; from what ``wanted`` needs and nothing else."""
    p = problem(form, shape, dtype, device, training=way != "frozen", layout=layout)
    p = p.with_(**{n: t * 4 for n, t in p.tensors.items() if n.endswith("weight")})
    p = replace(p, activation=BY_NAME[activation], wanted=WANTED[wanted])
    nodes = launch_table.EVERY_NODE if way == "one launch" else launch_table.NO_NODE
    with launch_table.using(ONE_LAUNCH_ELEMENTS=nodes):
        check(p, ours(p, way, forked))


@covering(
    activation=[*EVERY, Activation("leaky_relu", -0.5), Activation("leaky_relu")],
    dtype=[torch.float64, torch.float32], dy=[1.0, float("inf")], from_bits=[False, True], form=FORMS,
)  # fmt: skip
def test_kinks_nan_and_infinity(activation, dtype, dy, from_bits, form, device):
    """In whole packs of the widest registers, and beyond."""
    check_points(activation, dtype, dy, from_bits, form, device)


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
