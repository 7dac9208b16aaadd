"""Hard numbers: large means, constants, NaN, Inf, exact zeros, low precision, determinism."""

from dataclasses import replace

import pytest
import torch
from covering import LAUNCHES, covering
from oracle import FORMS, LAYOUTS, assert_close, in_layout, pre_activation, problem, relative_error, run

import resfused.functional as fused
from resfused import reference


@covering(
    form=FORMS, layout=LAYOUTS, training=[True, False], launches=LAUNCHES, indirect=("launches",),
    dtypes=[(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)  # fmt: skip
def test_low_precision_is_no_worse_than_twice_eager(form, layout, training, dtypes, device, launches):
    """Against float64 on the same inputs, normwise, output and every gradient."""
    dtype, parameter_dtype = dtypes
    p = problem(form, (4, 24, 7, 8), dtype, device, training=training, layout=layout, parameter_dtype=parameter_dtype)
    ours, eager, exact = run(fused, p), run(reference, p), run(reference, p, torch.float64)
    for name in exact:
        assert ours[name].dtype == eager[name].dtype
        limit = 2 * relative_error(eager[name], exact[name]) + 1e-6
        assert relative_error(ours[name], exact[name]) <= limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_rounded_to_nearest(dtype, device):
    """Once, from float32: within half a unit in the last place, and its own small error."""
    p = problem("norm+relu", (4, 24, 3, 4), dtype, device)
    y, exact = run(fused, p)["output"].double(), run(reference, p, torch.float64)["output"]
    assert ((y - exact).abs() <= 1.001 * torch.finfo(dtype).eps / 2 * exact)[exact > 0.01].all()


@covering(form=FORMS, layout=LAYOUTS, launches=LAUNCHES, indirect=("launches",))
def test_mean_far_over_std(form, layout, device, small_launches, launches):
    """Mean 1e4, std 1, where Σx² - (Σx)² keeps no digit of the variance in float32.

    What remains is the rounding of a mean to float32, mean·2^-24, in units of std: on x̂ and so on everything.
    """
    p = problem(form, (8, 5, 12, 12), torch.float32, device, layout=layout)
    p = p.with_(input=p.tensors["input"] / 2 + 1e4)
    # Where z is nearer to zero than its rounding, the sign and with it the gradient is anyone's.
    p = replace(p, dy=p.dy.where(pre_activation(p).abs() > 1e-2, 0))
    ours, exact = run(fused, p), run(reference, p, torch.float64)
    assert_close(ours, exact, 2 * 1e4 * 2**-24)
    assert relative_error(ours["running_var"], exact["running_var"]) < 1e4 * 2**-24 / 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 16, 9, 11), (48, 16, 7, 7)], ids=str)
def test_the_mean_is_exact_to_rounding(layout, shape, device):
    """Within a unit in the last place, where mean >> std: merges correct it by the mean of the deviations from it."""
    x = in_layout((torch.randn(shape, dtype=torch.float64) + 1e4).to(device, torch.float32), layout)
    mean, var = torch.zeros(2, 16, device=device)
    fused.batch_norm_relu(x, mean, var, training=True, momentum=1.0)
    # From 2^13 to 2^14 a float32 has 2^-10 to the next.
    assert (mean.double() - x.double().mean((0, 2, 3))).abs().max() < 2**-10


def test_first_rows_far_from_the_rest(device, small_launches, launches):
    """Parts of a channel with means far apart: what the merge of partial statistics must get right."""
    p = problem("norm+relu", (16, 5, 6, 6), torch.float32, device)
    x = p.tensors["input"].clone()
    x[:1] += 1e3
    p = p.with_(input=x)
    assert_close(run(fused, p), run(reference, p, torch.float64), 2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_channels(form, value, device):
    p = problem(form, (4, 3, 5, 5), torch.float64, device)
    p = p.with_(input=torch.full_like(p.tensors["input"], value))
    ours, exact = run(fused, p), run(reference, p)
    assert_close(ours, exact, 1e-9)
    float32 = replace(p, tensors={n: t.float() for n, t in p.tensors.items()}, dy=p.dy.float())
    assert run(fused, float32)["output"].isfinite().all()


@covering(
    form=FORMS, training=[True, False], value=[float("nan"), float("inf"), float("-inf")], where=["input", "residual"],
    valid=lambda form, where, **others: where == "input" or form != "norm+relu",
)  # fmt: skip
def test_nan_and_inf_stand_where_eager_has_them(form, training, value, where, device):
    p = problem(form, (4, 5, 3, 3), torch.float64, device, training=training)
    p.tensors[where][1, 2, 0, 1] = value
    ours, eager = run(fused, p), run(reference, p)
    for name in eager:
        if "running" in name:
            # A mean over Inf is Inf or NaN by the order of the additions.
            assert torch.equal(ours[name].isfinite(), eager[name].isfinite()), name
        else:
            assert relative_error(ours[name], eager[name]) < 1e-12, name


def test_nan_gradient_is_stopped_by_a_closed_relu(device):
    """A select, not a product: 0·inf and 0·nan would be NaN."""
    p = problem("norm+add+relu", (4, 5, 3, 3), torch.float64, device, training=False)
    closed = run(reference, p)["output"] == 0
    assert closed.any()
    dy = p.dy.clone()
    dy[closed] = float("inf")
    results = run(fused, replace(p, dy=dy))
    assert_close(results, run(reference, replace(p, dy=torch.where(closed, 0, dy))), 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_no_gradient_at_exact_zero(form, training, device):
    """weight = bias = 0 and residual = 0 make every z an exact zero, -0 too."""
    p = problem(form, (4, 5, 3, 3), torch.float32, device, training=training)
    zeros = {n: torch.zeros_like(t) for n, t in p.tensors.items() if n.endswith(("weight", "bias")) or n == "residual"}
    results = run(fused, p.with_(**zeros))
    assert (results["output"] == 0).all()
    for name in results:
        if name.startswith("gradient"):
            assert (results[name] == 0).all(), name


def test_running_statistics_to_the_bit(device, launches):
    """Sums of small integers over 2^k values are exact in any order: only the formula can differ."""
    x = torch.randint(-8, 8, (4, 6, 4, 4)).to(device, torch.float32)
    for momentum in (0.0, 0.25, 0.5, 1.0):
        ours = torch.ones(6, device=device), torch.full((6,), 2.0, device=device)
        exact = [t.double() for t in ours]
        fused.batch_norm_relu(x, *ours, training=True, momentum=momentum)
        reference.batch_norm_relu(x.double(), *exact, training=True, momentum=momentum)
        assert torch.equal(ours[0], exact[0].float())
        torch.testing.assert_close(ours[1], exact[1].float(), rtol=3e-7, atol=0)


def test_momentum_is_not_rounded_to_float32(device):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device)
    ours, eager = torch.zeros(2, 3, dtype=torch.float64, device=device).unbind(), torch.zeros(2, 3).double().unbind()
    fused.batch_norm_relu(x, *ours, training=True, momentum=0.1)
    reference.batch_norm_relu(x.cpu(), *eager, training=True, momentum=0.1)
    torch.testing.assert_close(ours[1].cpu(), eager[1], rtol=1e-14, atol=0)


def test_eps_is_not_rounded_to_float32(device):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device) * 1e-3
    for training in (True, False):
        stats = [None, None] if training else [x.mean((0, 2, 3)), x.var((0, 2, 3))]
        ours = fused.batch_norm_relu(x, *stats, training=training, eps=1e-5)
        torch.testing.assert_close(
            ours, reference.batch_norm_relu(x, *stats, training=training, eps=1e-5), rtol=1e-12, atol=1e-13
        )


@covering(form=FORMS, layout=LAYOUTS, launches=LAUNCHES, indirect=("launches",))
def test_results_repeat_bit_for_bit(form, layout, device, small_launches, launches):
    p = problem(form, (3, 12, 5, 5), torch.float32, device, layout=layout)
    first, second = run(fused, p), run(fused, p)
    assert all(torch.equal(first[name], second[name]) for name in first)
