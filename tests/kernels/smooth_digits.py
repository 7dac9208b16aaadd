"""How many digits of the smooth activations the kernels in C++ have, in float32."""

import torch
from activation_cases import BY_NAME
from resfused.kernels import cpu

from resfused import reference


def assert_accurate():
    """Values and derivatives to a few roundings, from where they vanish to where they end, against float64."""
    z = torch.cat([torch.linspace(-110, 110, 100_003), torch.linspace(-6, 6, 100_003), torch.logspace(-30, 0, 999)])
    exact = z.double().requires_grad_()
    a, eps = z.double().abs(), torch.finfo(torch.float32).eps
    for name in ("silu", "sigmoid", "gelu", "gelu_tanh"):
        y = reference.activate(exact, BY_NAME[name])
        (slope,) = torch.autograd.grad(y.sum(), exact)
        y = y.detach()
        ours, our_slope = _of(BY_NAME[name], z)
        # Of gelu z times a probability, whose own rounding counts where it is small.
        room = y.abs() if name in ("silu", "sigmoid") else a * (y / z).abs().clamp(min=0.5)
        # And the subnormals' steps.
        wrong = (ours.double() - y).abs() > 3 * eps * room + 3e-45 * a.clamp(min=1)
        assert not wrong.any(), (name, z[wrong])
        wrong = (our_slope.double() - slope).abs() > 3 * eps
        assert not wrong.any(), (name, z[wrong])


def _of(activation, z):
    """By a frozen norm that changes nothing, each value a channel."""
    x, ones = z.view(1, -1), torch.ones_like(z)
    norm = cpu.Norm(None, None, torch.zeros_like(z), ones, 0.0, 0.0)
    y, _, _ = cpu.forward(x, None, norm, None, False, False, activation)
    kept = cpu.Kept(x, x.dtype, None, None, None, None, norm, None, activation)
    wanted = cpu.Gradients(True, False, False, False, False, False)
    return y[0], cpu.backward(ones.view(1, -1), None, kept, wanted).x[0]
