"""The three forms against PyTorch in float64: values, gradients, running statistics."""

from dataclasses import replace
from itertools import chain, combinations
from unittest import mock

import pytest
import torch
from covering import LAUNCHES, covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FORMS, LAYOUTS, PARAMETERS, TOLERANCE, assert_close, in_layout, kernels_in_force, problem, run

import resfused.functional as fused
from resfused import backend_for, reference
from resfused.backend import require_kernels


def check(p):
    """Ours in the problem's dtype against the reference in float64, kernels and not the fallback."""
    assert backend_for(p.tensors["input"]) == kernels_in_force()
    dtype = torch.promote_types(p.tensors["input"].dtype, p.dy.dtype)
    actual = run(fused, p)
    assert_close(actual, run(reference, p, torch.float64), TOLERANCE[dtype])
    return actual


DTYPES = (torch.float64, torch.float32)
MODES = (True, False)
SHAPES = [
    (2, 1), (33, 3), (5, 130), (3, 4, 5), (2, 1, 6, 3), (4, 3, 7, 7), (2, 130, 3, 5), (2, 64, 4, 4), (2, 24, 4, 2),
    (7, 16, 1, 1), (1, 5, 2, 1), (2, 3, 2, 3, 5), (2, 9, 2, 2, 2, 2), (1, 8, 40, 50), (300, 2),
    (40, 3, 7, 7), (33, 2, 3, 2, 2), (35, 9, 11),
]  # fmt: skip


@covering(form=FORMS, training=MODES, layout=LAYOUTS, shape=SHAPES, dtype=DTYPES)
def test_values(form, training, layout, shape, dtype, device):
    check(problem(form, shape, dtype, device, training=training, layout=layout))


@covering(
    form=FORMS, training=MODES, shape=[(3, 19, 5, 5), (2, 16, 8, 8), (3, 3, 5, 31)], layout=LAYOUTS, dtype=DTYPES,
    launches=LAUNCHES, indirect=("launches",), together=("training", "shape", "layout"),
)  # fmt: skip
def test_values_when_every_loop_turns(form, training, shape, layout, dtype, device, small_launches, launches):
    check(problem(form, shape, dtype, device, training=training, layout=layout))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_of_any_shape(data, device, small_launches, launches):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=5), label="shape"))
    training = data.draw(st.booleans(), label="training")
    if training and torch.Size(shape).numel() == shape[1]:
        shape = (2 * shape[0], *shape[1:])
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    form = data.draw(st.sampled_from(FORMS), label="form")
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    check(problem(form, shape, torch.float64, device, training=training, layout=layout))


def test_values_of_many_elements(device, launches):
    check(problem("norm+add+relu", (2, 33, 48, 48), torch.float32, device, layout="channels_last"))
    check(problem("norm+add(norm)+relu", (2, 3, 112, 112), torch.float32, device))


STRIDES = {
    "channels sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "batch strided": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "columns sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "spatial transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch and channels transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last columns sliced": lambda x: in_layout(torch.cat([x, x], -1), "channels_last")[..., : x.shape[-1]],
    "misaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
    "channels_last": lambda x: in_layout(x, "channels_last"),
    "contiguous": lambda x: x.contiguous(),
}


@covering(
    form=FORMS, layout=LAYOUTS, strides=STRIDES, which=["input", "residual", "dy"],
    valid=lambda form, which, **others: which != "residual" or form != "norm+relu",
)  # fmt: skip
def test_strides(form, layout, strides, which, device):
    p = problem(form, (4, 6, 5, 4), torch.float64, device, layout=layout)
    if which == "dy":
        check(replace(p, dy=STRIDES[strides](p.dy)))
    else:
        check(p.with_(**{which: STRIDES[strides](p.tensors[which])}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_keep_the_layout(layout, device):
    p = problem("norm+add(norm)+relu", (2, 8, 3, 5), torch.float32, device, layout=layout)
    results = run(fused, p)
    for name in ("output", "gradient of input", "gradient of residual"):
        assert results[name].stride() == p.tensors["input"].stride()
    sliced = p.with_(**{name: STRIDES["columns sliced"](p.tensors[name]) for name in ("input", "residual")})
    if layout == "channels_last":
        sliced = p.with_(**{n: STRIDES["channels_last columns sliced"](p.tensors[n]) for n in ("input", "residual")})
    results = run(fused, sliced)
    for name in ("output", "gradient of input", "gradient of residual"):
        assert results[name].stride() == p.tensors["input"].stride(), name


def test_vectors_need_not_be_contiguous(device):
    p = problem("norm+add(norm)+relu", (4, 6, 3, 3), torch.float64, device)
    for name in (*PARAMETERS, "running_mean", "residual_running_var"):
        p = p.with_(**{name: torch.stack([p.tensors[name]] * 2, 1)[:, 0]})
    check(p)
    expected = run(reference, p, torch.float64)["running_mean"]
    wide = torch.stack([p.tensors["running_mean"]] * 2, 1)
    fused.batch_norm_relu(p.tensors["input"], wide[:, 0], wide[:, 1].clone(), training=True, momentum=0.3)
    torch.testing.assert_close(wide[:, 0], expected)
    assert torch.equal(wide[:, 1], p.tensors["running_mean"])


@covering(
    form=FORMS, training=MODES,
    absent=[("weight",), ("bias",), ("weight", "bias"), ("residual_weight",), ("residual_bias", "weight")],
    valid=lambda form, absent, **others: form == FORMS[2] or not any(n.startswith("residual") for n in absent),
)  # fmt: skip
def test_absent_parameters(form, training, absent, device):
    p = problem(form, (4, 5, 3, 3), torch.float64, device, training=training)
    check(p.with_(**dict.fromkeys(absent)))


@pytest.mark.parametrize("form", FORMS)
def test_absent_running_statistics(form, device):
    p = problem(form, (4, 5, 3, 3), torch.float64, device)
    check(p.with_(**{name: None for name in p.tensors if "running" in name}))


@covering(form=FORMS, training=MODES, launches=LAUNCHES, indirect=("launches",))
def test_any_subset_of_gradients(form, training, device, launches):
    p = problem(form, (3, 5, 2, 3), torch.float64, device, training=training)
    names = [n for n in ("input", "residual", *PARAMETERS) if n in p.tensors]
    # None, each alone, all but one, all.
    for subset in chain.from_iterable(combinations(names, size) for size in {0, 1, len(names) - 1, len(names)}):
        check(replace(p, wanted=subset))


PRECISIONS = {**TOLERANCE, torch.float16: 1e-3, torch.bfloat16: 1e-2}


TWO_DTYPES = [
    (torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float16), (torch.bfloat16, torch.float16),
]  # fmt: skip


@covering(form=FORMS[1:], dtypes=TWO_DTYPES, launches=LAUNCHES, indirect=("launches",))
def test_two_dtypes_promote_as_in_eager(form, dtypes, device, launches):
    input_dtype, residual_dtype = dtypes
    promoted = torch.promote_types(input_dtype, residual_dtype)
    # Of each tensor every digit counts: none is another's, widened.
    p, other, wide = (problem(form, (4, 8, 3, 3), dtype, device) for dtype in (input_dtype, residual_dtype, promoted))
    p = p.with_(**{name: tensor for name, tensor in other.tensors.items() if name.startswith("residual")})
    p = replace(p, dy=wide.dy)
    ours, eager, exact = run(fused, p), run(reference, p), run(reference, p, torch.float64)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in eager.items()}
    # Each to its own precision: arithmetic is in the wider of the two, and nothing on the way is narrower.
    for name, tensor in ours.items():
        assert_close({name: tensor}, {name: exact[name]}, PRECISIONS[tensor.dtype])


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_one_input_for_two_arguments(training, device):
    """x as its own residual: both gradients reach it."""
    p = problem("norm+add+relu", (4, 5, 3, 3), torch.float64, device, training=training)

    def gradient(implementation):
        x = p.tensors["input"].clone().requires_grad_()
        stats = p.tensors["running_mean"].clone(), p.tensors["running_var"].clone()
        implementation.batch_norm_add_relu(x, x, *stats, training=training).backward(p.dy)
        return {"x": x.grad}

    assert_close(gradient(fused), gradient(reference), 1e-12)


SHARED = {
    "the same tensors": lambda s: (s[:6], s[6:12]) * 2,
    "views": lambda s: (s[:6], s[6:12], s[:6], s[6:12]),
    "the mean": lambda s: (s[:6], s[6:12], s[:6], s[12:18]),
    "the variance": lambda s: (s[:6], s[6:12], s[12:18], s[6:12]),
    "mean and variance crossed": lambda s: (s[:6], s[6:12], s[6:12], s[:6]),
    "a few elements": lambda s: (s[:6], s[6:12], s[12:18], s[9:15]),
    "strided": lambda s: (s[:12:2], s[12:18], s[:12:2], s[1:13:2]),
}


@pytest.mark.parametrize(
    ("shared", "compiler"),
    [*((shared, None) for shared in SHARED), ("strided", "eager"), ("the mean", "aot_eager")],
)
def test_shared_running_statistics_are_updated_one_after_the_other(shared, compiler, device):
    """First the input's norm, then the residual's, as eager does; never by two programs of one launch."""
    p = problem("norm+add(norm)+relu", (4, 6, 3, 3), torch.float64, device)

    def eager(x, r, mean, var, residual_mean, residual_var):
        y = torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=0.3)
        r = torch.nn.functional.batch_norm(r, residual_mean, residual_var, training=True, momentum=0.2)
        return (y + r).relu()

    def ours(x, r, *statistics):
        return fused.batch_norm_add_batch_norm_relu(
            x, r, *statistics, training=True, momentum=0.3, residual_momentum=0.2
        )

    def updated(implementation):
        memory = torch.linspace(0.5, 1.5, 18, dtype=torch.float64, device=device)
        y = implementation(p.tensors["input"], p.tensors["residual"], *SHARED[shared](memory))
        return {"y": y, "memory": memory}

    call = ours if compiler is None else torch.compile(ours, backend=compiler, fullgraph=True)
    kernels = require_kernels(p.tensors["input"])
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as launched:
        assert_close(updated(call), updated(eager), 1e-12)
    ((_, _, norm, residual_norm, *_), _) = launched.call_args
    vectors = [v for n in (norm, residual_norm) for v in (n.running_mean, n.running_var)]
    assert len({v[i].data_ptr() for v in vectors for i in range(6)}) == 24


def test_norms_apart_in_one_storage_are_updated_in_one_launch(device):
    p = problem("norm+add(norm)+relu", (4, 5, 3, 3), torch.float64, device)
    memory = torch.ones(20, dtype=torch.float64, device=device)
    kernels = require_kernels(p.tensors["input"])
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as launched:
        fused.batch_norm_add_batch_norm_relu(
            p.tensors["input"], p.tensors["residual"], *memory.view(4, 5), training=True
        )
    assert launched.call_args.args[2].running_mean.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(("form", "scale"), [*zip(FORMS, (1e35, 1e20, 1e20), strict=True)])
def test_a_variance_that_overflows_is_infinite(form, scale, device, launches):
    """In float32, from a standard deviation of 1.8e19 / sqrt(M) on; the output is the bias, as in eager."""
    p = problem(form, (4, 6, 5, 4), torch.float32, device)
    p = p.with_(input=p.tensors["input"] * scale)
    ours, eager = run(fused, p), run(reference, p)
    assert not any(result.isnan().any() for result in ours.values())
    assert ours["running_var"].isinf().all()
    assert_close(ours, eager, 1e-5)


def test_running_statistics_change_between_forward_and_backward_is_an_error(device):
    """The backward of a frozen norm needs the statistics that its forward used."""
    p = problem("norm+relu", (4, 5, 3, 3), torch.float32, device)
    x = p.tensors["input"].requires_grad_()
    stats = p.tensors["running_mean"], p.tensors["running_var"]
    y = fused.batch_norm_relu(x, *stats, training=False)
    fused.batch_norm_relu(x.detach(), *stats, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
