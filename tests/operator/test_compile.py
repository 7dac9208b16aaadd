"""The operators under the dispatcher's own checks, and torch.compile without a graph break."""

import copy

import pytest
import torch
from oracle import FORMS, LAYOUTS, problem
from resfused.kernels.activation import RELU
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import resfused
from resfused.operator import ops


def arguments(p, mask, activation=RELU):
    """The operators' argument list for a problem."""
    g = p.tensors.get
    norm = (g("weight"), g("bias"), g("running_mean"), g("running_var"), 0.3, 1e-3)
    residual_norm = (
        g("residual_weight"), g("residual_bias"), g("residual_running_mean"), g("residual_running_var"), 0.3, 1e-3
    )  # fmt: skip
    return g("input"), g("residual"), *norm, p.form == FORMS[2], *residual_norm, *activation, mask


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(form, layout, device):
    p = problem(form, (3, 6, 4, 2), torch.float32, device, layout=layout)
    forward = arguments(p, form == FORMS[1])
    opcheck(ops.forward_training, forward, test_utils=CHECKS)
    opcheck(ops.forward_frozen, forward, test_utils=CHECKS)
    _, mask, stats = ops.forward_training(*forward)
    residual = p.tensors.get("residual")
    saved = residual if form == FORMS[2] else None
    dtype = None if residual is None else residual.dtype
    wanted = [True, residual is not None, True, True, form == FORMS[2], form == FORMS[2]]
    norms = forward[2:-1]
    for values in (mask, stats), (mask, None):
        values = (values[0] if form == FORMS[1] else None, values[1])
        for fork in (p.dy, None):
            backward = (p.dy, fork, p.tensors["input"], None, saved, dtype, *values, *norms, wanted)
            opcheck(ops.backward, backward, test_utils=CHECKS)


@pytest.mark.parametrize("form", FORMS[1:])
def test_opcheck_of_two_dtypes(form, device):
    """Fake outputs have the promoted dtype, the residual's gradient that of the residual."""
    p = problem(form, (3, 6, 4, 2), torch.bfloat16, device)
    x, residual, *rest = arguments(p, form == FORMS[1])
    residual = residual.float()
    opcheck(ops.forward_training, (x, residual, *rest), test_utils="test_faketensor")
    y, mask, stats = ops.forward_training(x, residual, *rest)
    two = form == FORMS[2]
    saved, mask = (residual, None) if two else (None, mask)
    wanted = [True, True, True, True, two, two]
    backward = (y, None, x, None, saved, torch.float32, mask, stats, *rest[:-1], wanted)
    opcheck(ops.backward, backward, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["ResidualBlock", "ProjectionResidualBlock"])
def test_whole_blocks(backend, name, device):
    """Forward, backward and buffers over two steps, then eval: the same numbers as without compile, one graph each."""
    torch._dynamo.reset()
    arguments = (4,) if name == "ResidualBlock" else (4, 6)
    plain = getattr(resfused, name)(*arguments).to(device, torch.float64)
    twin = copy.deepcopy(plain)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(3):
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64, device=device)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = plain(inputs[0]), compiled(inputs[1])
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-11, atol=1e-12)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-11)
    assert counter.frame_count == 1
    for (key, a), (_, b) in zip(plain.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10, msg=key)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-11, atol=1e-12, msg=key)
    plain.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-11, atol=1e-12)
