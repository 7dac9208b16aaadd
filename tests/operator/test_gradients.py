"""First derivatives by finite differences, second derivatives, and what autograd is told."""

import pytest
import torch
from oracle import FORMS, LAYOUTS, PARAMETERS, assert_close, call, problem, run
from resfused.kernels.activation import RELU

import resfused
import resfused.functional as fused
from resfused import reference


def differentiable(form, training, device):
    """The form as a function of its differentiable tensors, and those tensors; z stays clear of the ReLU's corner."""
    p = problem(form, (3, 2, 2, 1), torch.float64, device, training=training)
    names = [n for n in ("input", "residual", *PARAMETERS) if n in p.tensors]
    stats = {n: t for n, t in p.tensors.items() if "running" in n and not training}

    def function(*values):
        return call(fused, p, {**stats, **dict(zip(names, values, strict=True))})

    return function, tuple(p.tensors[n].requires_grad_() for n in names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradcheck(form, training, device):
    function, inputs = differentiable(form, training, device)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradgradcheck(form, training, device):
    function, inputs = differentiable(form, training, device)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradient_penalty(form, training, device):
    """The parameters' gradients of |d output / d input|², against PyTorch's double backward."""
    p = problem(form, (4, 3, 3, 2), torch.float64, device, training=training)

    def penalty(implementation):
        t = {
            n: v.clone().requires_grad_(n in ("input", "residual", *PARAMETERS)) if "running" not in n else v.clone()
            for n, v in p.tensors.items()
        }
        y = call(implementation, p, t)
        (dx,) = torch.autograd.grad((y * p.dy).sum(), t["input"], create_graph=True)
        dx.square().sum().backward()
        return {n: v.grad for n, v in t.items() if v.grad is not None}

    ours, eager = penalty(fused), penalty(reference)
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-9, atol=1e-11)
    missing = {name for name in eager if eager[name].any()} - ours.keys()
    assert not missing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_create_graph_changes_no_gradient(form, training, layout, device):
    """The differentiable backward against the kernels' and eager's: infinite where the ReLU is closed, zero at zero."""
    p = problem(form, (4, 3, 3, 2), torch.float64, device, training=training, layout=layout)
    if not training:
        # Zeros, and a NaN, which the ReLU lets through.
        for name, tensor in p.tensors.items():
            if name.endswith(("weight", "bias")) or name == "residual":
                tensor[:1].zero_()
        p.tensors["input"][1, 2, 1, 1] = float("nan")
    dy = torch.where(run(reference, p)["output"] == 0, float("inf"), p.dy)

    def gradients(implementation, create_graph):
        leaves = {n: t.clone().requires_grad_("running" not in n) for n, t in p.tensors.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        y = call(implementation, p, leaves)
        found = torch.autograd.grad(y, wanted, dy, create_graph=create_graph)
        return dict(zip(leaves, (g.detach() for g in found), strict=False))

    expected = gradients(reference, False)
    assert all(g.isfinite().any() for g in expected.values())
    assert_close(gradients(fused, True), expected, 1e-11)
    assert_close(gradients(fused, False), expected, 1e-11)


def test_saves_no_second_activation(device):
    """What a graph holds: x (and s with its norm), a bit an element where the residual is not held, vectors."""
    for form, kept in zip(FORMS, (1, 1, 2), strict=True):
        p = problem(form, (4, 64, 16, 16), torch.float32, device)
        saved: list[torch.Tensor] = []

        def keep(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        t = {n: v.requires_grad_("running" not in n) for n, v in p.tensors.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call(fused, p, t)
        activation = p.tensors["input"].numel()
        large = [s for s in saved if s.numel() * s.element_size() > activation * 4 / 16]
        assert {s.data_ptr() for s in large} <= {p.tensors["input"].data_ptr(), *(
            [p.tensors["residual"].data_ptr()] if kept == 2 else []
        )}  # fmt: skip
        masks = [s for s in saved if s.dtype == torch.uint8]
        assert [m.numel() for m in masks] == ([activation // 8] if form == "norm+add+relu" else [])


def test_two_calls_before_one_backward(device):
    """Nothing is kept on the module between a forward and its backward."""
    ours, eager = resfused.BatchNormAddReLU2d(6).to(device), torch.nn.BatchNorm2d(6).to(device)
    a, b, r = (torch.randn(3, 6, 4, 4, device=device) for _ in range(3))
    with torch.no_grad():
        ours.weight.copy_(torch.randn(6))
        eager.weight.copy_(ours.weight)
    (ours(a, r).square().sum() + ours(b, r).sum()).backward()
    ((eager(a) + r).relu().square().sum() + (eager(b) + r).relu().sum()).backward()
    torch.testing.assert_close(ours.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_var, eager.running_var)


def test_backward_twice_over_a_retained_graph(device):
    p = problem("norm+add+relu", (4, 3, 3, 2), torch.float64, device)
    x = p.tensors["input"].requires_grad_()
    y = fused.batch_norm_add_relu(x, p.tensors["residual"], None, None, training=True)
    (first,) = torch.autograd.grad(y, x, p.dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(first, second)


def test_inputs_are_not_changed(device):
    for form in FORMS:
        p = problem(form, (4, 6, 3, 3), torch.float32, device)
        before = {n: t.clone() for n, t in p.tensors.items()} | {"dy": p.dy.clone()}
        run(fused, p)
        for name, tensor in ({**p.tensors, "dy": p.dy}).items():
            assert torch.equal(tensor, before[name]), name


def test_the_function_refuses_what_the_kernels_cannot_take(device):
    x = torch.randn(2, 3, 4, device="meta")
    numbers = (0.1, 1e-5, False, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="input is on meta"):
        resfused.FusedResidualBlock.apply(x, *[None] * 5, [None] * 4, numbers, True, RELU, False)
