"""The kernels in C++ with every activation: whole packs, any mixture of dtypes, threads, digits of the smooth ones."""

from dataclasses import replace

import pytest
import torch
from activation_cases import BY_NAME, EVERY, WANTED, check, clear_of_kinks, exists, hardsigmoid, ours
from covering import covering
from oracle import FORMS, LAYOUTS, problem, relative_error, run
from resfused.kernels import cpu
from resfused.kernels.cpu import functions
from smooth_digits import assert_accurate

import resfused
from resfused import reference

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows to the last of a pack and in one part, planes by columns, in pieces, and one by one.
SHAPES = ((33, 3), (70, 72), (8, 24, 6, 4), (5, 3, 7, 7), (2, 3, 50, 90), (2, 17, 5, 3))


@pytest.fixture(autouse=True)
def native(_reproducible, monkeypatch):
    monkeypatch.setitem(reference._FUNCTIONS, "hardsigmoid", hardsigmoid)
    with resfused.use_backend("native"):
        yield


@covering(
    exists, together=("name", "form", "training"), name=BY_NAME, form=FORMS, training=(True, False), wanted=WANTED,
    layout=LAYOUTS, dtype=DTYPES, shape=SHAPES, forked=(False, True),
)  # fmt: skip
def test_values_of_many_elements(name, form, training, wanted, layout, dtype, shape, forked):
    p = problem(form, shape, dtype, CPU, training=training, layout=layout)
    p = clear_of_kinks(replace(p, activation=BY_NAME[name], wanted=WANTED[wanted]))
    check(p, ours(p, forked=forked))


@covering(
    exists, name=BY_NAME, of_input=DTYPES, of_residual=DTYPES, form=FORMS[1:], training=(True, False), wanted=WANTED,
    layout=LAYOUTS,
)  # fmt: skip
def test_any_two_dtypes(name, of_input, of_residual, form, training, wanted, layout):
    """As exact as the narrowest of what a result was made of; its dtype is that of what it belongs to."""
    p = problem(form, (3, 21, 5, 7), torch.float64, CPU, training=training, layout=layout)
    p = replace(p, activation=BY_NAME[name], wanted=WANTED[wanted])

    def own(n, tensor):
        dtype = of_residual if n.startswith("residual") else of_input
        return tensor.to(torch.promote_types(dtype, torch.float32) if tensor.dim() == 1 else dtype)

    y = torch.promote_types(of_input, of_residual)
    p = clear_of_kinks(replace(p, tensors={n: own(n, t) for n, t in p.tensors.items()}, dy=p.dy.to(y)))
    found, exact = ours(p), run(reference, p, torch.float64)
    for n in exact:
        assert found[n].dtype is (y if n == "output" else p.tensors[n.removeprefix("gradient of ")].dtype), n
        limit = max(torch.finfo(found[n].dtype).eps, 1e-12 if torch.float64 in (of_input, of_residual) else 5e-6)
        assert relative_error(found[n], exact[n]) <= limit, n


def test_smooth_to_a_few_roundings():
    assert_accurate()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_is_the_norm_alone(layout):
    """Bit by bit: dx is weight·rstd·dy, and the residual's gradient is dy."""
    p = problem(FORMS[1], (3, 21, 5, 7), torch.float32, CPU, training=False, layout=layout)
    found = ours(replace(p, activation=BY_NAME["identity"], wanted=WANTED["inputs"]))
    rstd = (p.tensors["running_var"].double() + p.numbers["eps"]).rsqrt().float()
    assert torch.equal(found["gradient of input"], p.dy * (p.tensors["weight"] * rstd).view(-1, 1, 1))
    assert torch.equal(found["gradient of residual"], p.dy)


@covering(
    name=("relu6", "hardswish", "silu", "gelu", "identity"), form=FORMS, layout=LAYOUTS, dtype=DTYPES[:2],
    shape=((16, 64, 28, 28), (32, 40, 7, 7), (5000, 30)), forked=(False, True),
)  # fmt: skip
def test_same_bits_whatever_the_threads(name, form, layout, dtype, shape, forked):
    p = replace(problem(form, shape, dtype, CPU, layout=layout), activation=BY_NAME[name])
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ours(p, forked=forked))
    for other in results[1:]:
        assert all(torch.equal(other[n], results[0][n]) for n in other)


@covering(
    name=("relu", "relu6", "leaky_relu", "silu", "identity"), form=FORMS, layout=LAYOUTS, training=(True, False),
    wanted=("everything", "inputs"), shape=((3, 5, 130, 101), (32, 48, 7, 7), (70, 72, 3, 8)),
)  # fmt: skip
def test_stores_past_the_caches(name, form, layout, training, wanted, shape, monkeypatch):
    """As of tensors larger than these: planes and rows on lines and off them."""
    monkeypatch.setattr(functions, "_caches", lambda: (2**18, 0))
    p = problem(form, shape, torch.float32, CPU, training=training, layout=layout)
    p = clear_of_kinks(replace(p, activation=BY_NAME[name], wanted=WANTED[wanted]))
    check(p, ours(p))


def test_nothing_stands_for_what_a_derivative_is_made_of():
    """A gradient without x and without bits is a mistake of the caller's, but an identity's."""
    one = torch.ones(4)
    norm = cpu.Norm(one, one, one, one, 0.1, 0.1)
    for activation in EVERY:
        kept = cpu.Kept(None, torch.float32, None, None, None, None, norm, None, activation)
        wanted = cpu.Gradients(True, False, False, False, False, False)
        if activation.name == "identity":
            cpu.backward(torch.ones(3, 4), None, kept, wanted)
            continue
        with pytest.raises(AssertionError):
            cpu.backward(torch.ones(3, 4), None, kept, wanted)
