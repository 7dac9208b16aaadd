"""Each block against the plain PyTorch block of the same name: several training steps, then eval."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from oracle import LAYOUTS, in_layout, relative_error
from resfused.kernels import gpu as kernels

import resfused
from resfused import reference

BLOCKS = {
    "ResidualBlock": ((6,), (3, 6, 7, 5)),
    "ProjectionResidualBlock": ((4, 6), (3, 4, 7, 6)),
    "ProjectionResidualBlock, stride 1": ((4, 6, 1), (3, 4, 4, 3)),
    "BottleneckResidualBlock": ((8, 8), (3, 8, 5, 4)),
    "BottleneckResidualBlock, projection": ((8, 12, 2), (3, 8, 5, 4)),
    "BottleneckResidualBlock, width": ((8, 8, 1, 3), (3, 8, 5, 4)),
    "LinearResidualBlock": ((6,), (9, 6)),
    "LinearResidualBlock, projection": ((6, 4, 5), (9, 6)),
}


def pair(name, dtype, device, layout="contiguous"):
    arguments, shape = BLOCKS[name]
    name = name.partition(",")[0]
    eager = getattr(reference, name)(*arguments)
    with torch.no_grad():
        # Biases that keep every channel alive: a dead one's gradients are cancellation and nothing else.
        for key, parameter in eager.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if key.endswith("weight") else 0.0))
    ours = getattr(resfused, name)(*arguments)
    ours.load_state_dict(eager.state_dict())
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return ours.to(device, dtype, memory_format=memory_format), eager.to(device, torch.float64), shape


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
def test_training_steps_then_eval(name, layout, dtype, tolerance, device):
    ours, eager, shape = pair(name, dtype, device, layout)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, eager)]
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        inputs = in_layout(x.to(dtype), layout).requires_grad_(), x.requires_grad_()
        with mock.patch.object(kernels, "forward", wraps=kernels.forward) as launched:
            outputs = ours(inputs[0]), eager(inputs[1])
        assert launched.call_count == (3 if name.startswith("Bottleneck") else 2)
        dy = torch.randn_like(outputs[1])
        for y, optimiser in zip(outputs, optimisers, strict=True):
            optimiser.zero_grad()
            y.backward(dy.to(y.dtype))
        assert relative_error(*outputs) < tolerance
        assert relative_error(inputs[0].grad, inputs[1].grad) < tolerance
        for (parameter, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
            assert relative_error(a.grad, b.grad) < tolerance, parameter
        for optimiser in optimisers:
            optimiser.step()
        for key, value in eager.state_dict().items():
            assert relative_error(ours.state_dict()[key], value) < tolerance, key
    ours.eval()
    eager.eval()
    with torch.no_grad():
        assert relative_error(ours(inputs[0]), eager(inputs[1])) < tolerance


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dict_both_ways(name, device):
    ours, eager, shape = pair(name, torch.float64, device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    ours(x)
    assert list(ours.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(ours.state_dict())
    assert relative_error(ours.eval()(x), eager.eval()(x)) < 1e-9


def test_state_dict_keys_are_the_classic_ones():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    main = [f"{m}.{k}" for m, keys in (("conv1", ["weight"]), ("bn1", norm), ("conv2", ["weight"]), ("bn2", norm))
            for k in keys]  # fmt: skip
    assert list(resfused.ResidualBlock(3).state_dict()) == main
    shortcut = ["shortcut.0.weight", *(f"shortcut.1.{k}" for k in norm)]
    assert list(resfused.ProjectionResidualBlock(3, 4).state_dict()) == main + shortcut


@pytest.mark.parametrize("library", [resfused, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name", BLOCKS)
def test_zero_init_residual(name, library, device):
    """The branch adds nothing at the start, in training and in eval; its convolutions are as random as ever."""
    arguments, shape = BLOCKS[name]
    block = getattr(library, name.partition(",")[0])(*arguments, zero_init_residual=True).to(device, torch.float64)
    usual = getattr(library, name.partition(",")[0])(*arguments)
    assert block.state_dict().keys() == usual.state_dict().keys()
    zeros = [key for key, parameter in block.named_parameters() if key.endswith("weight") and not parameter.any()]
    assert zeros == ["bn3.weight" if name.startswith("Bottleneck") else "bn2.weight"]
    assert all(p.any() for key, p in usual.named_parameters() if key.endswith("weight"))
    shortcut = copy.deepcopy(block).shortcut if getattr(block, "shortcut", None) is not None else torch.nn.Identity()
    x = torch.randn(shape, dtype=torch.float64, device=device)
    for mode in (True, False):
        expected = torch.relu(shortcut.train(mode)(x))
        y = block.train(mode)(x)
        # A shortcut without a norm is copied to the bit; a norm in the kernels rounds in its own order.
        exact = not isinstance(shortcut, torch.nn.Sequential)
        assert torch.equal(y, expected) if exact else relative_error(y, expected) < 1e-12


def test_zero_init_residual_is_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        resfused.ResidualBlock(4, True)


def test_copies(device):
    block = resfused.ProjectionResidualBlock(3, 4).to(device).eval()
    x = torch.randn(2, 3, 4, 4, device=device)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))


def test_autocast_promotes_as_eager_does(device):
    """Under autocast the convolutions give bfloat16 and the residual stays float32: the sum is float32."""
    ours, eager = resfused.ResidualBlock(8).to(device), reference.ResidualBlock(8).to(device)
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(4, 8, 6, 6, device=device)
    exact = copy.deepcopy(eager).double()(x.double())
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = ours(x), eager(x)
    assert y.dtype == expected.dtype == torch.float32
    assert relative_error(y, exact) <= 2 * relative_error(expected, exact)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
