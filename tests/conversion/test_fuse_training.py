"""Fused models in training loops: precisions, accumulation, checkpointing, copies, files, freezing."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, relative_error
from small_networks import (
    ResNet,
    activations,
    backward,
    chain,
    fused_and_eager,
    images,
    is_fused,
    state,
    step,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import resfused

TESTS = Path(__file__).parents[1]


def assert_as_exact_as_eager(actual, expected, exact):
    """The same dtypes; errors within twice eager's own: the output's, the gradients' and the buffers' together."""
    assert actual.keys() == expected.keys() == exact.keys()
    for name, tensor in actual.items():
        assert tensor.dtype is expected[name].dtype, name
    gradients = {name for name in exact if name.startswith("gradient")}
    for names in ({"output"}, gradients, exact.keys() - gradients - {"output"}):
        own, eagers = (sum(relative_error(r[n], exact[n]) ** 2 for n in names) ** 0.5 for r in (actual, expected))
        assert own <= 2 * eagers, names


def in_float64(eager, x):
    return step(copy.deepcopy(eager).double(), x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """A training step with the loss scaled, as GradScaler asks for in half precision."""
    fused, eager = fused_and_eager(ResNet(), device, torch.float32)
    x = images(device, torch.float32, number=4)
    results = []
    for model, kind in ((fused, dtype), (eager, dtype), (copy.deepcopy(eager).double(), None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**8, enabled=dtype is torch.float16 and kind is not None
        )
        with torch.autocast(device.type, kind, enabled=kind is not None):
            y = model(x if kind else x.double())
            loss = F.cross_entropy(y, torch.arange(4, device=device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append({"output": y, **state(model)})
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert results[0]["output"].dtype is dtype
    assert_as_exact_as_eager(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norms", ["float32 norms", "half norms"])
def test_half_models(dtype, norms, device):
    fused, eager = fused_and_eager(chain(), device, torch.float32)
    x = activations(device, dtype, number=4)
    for model in (fused, eager):
        model.to(dtype)
        if norms == "float32 norms":
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.float()
    exact = in_float64(eager, x)
    assert_as_exact_as_eager(step(fused, x), step(eager, x), exact)


def test_channels_last(device):
    """Activations keep the layout from end to end, forward and backward."""
    fused, eager = fused_and_eager(chain(), device)
    for model in (fused, eager):
        model.to(memory_format=torch.channels_last)
    x = activations(device).to(memory_format=torch.channels_last)
    actual, expected = step(fused, x), step(eager, x)
    assert_close(actual, expected, 1e-9)
    for name in ("output", "gradient of the input"):
        assert actual[name].is_contiguous(memory_format=torch.channels_last), name
        assert not actual[name].is_contiguous(), name


def test_gradient_accumulation(device):
    fused, eager = fused_and_eager(chain(), device)
    for _ in range(3):
        x = activations(device)
        for model in (fused, eager):
            backward(model(x) / 3)
    assert_close(state(fused), state(eager), 1e-9)


class Checkpointed(nn.Module):
    """The chain, with each part of a kind recomputed in the backward."""

    def __init__(self, model, parts, use_reentrant):
        super().__init__()
        self.model, self.parts, self.use_reentrant = model, parts, use_reentrant

    def forward(self, x):
        model = self.model
        parts = {"stages": list(model), "blocks": [block for stage in model for block in stage], "all": [model]}
        for part in parts[self.parts]:
            x = checkpoint(part, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("parts", ["stages", "blocks", "all"])
def test_checkpointing(parts, use_reentrant, device):
    """Statistics and counters too, which the recomputation updates once more, in eager as well."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    actual, expected = (step(Checkpointed(m, parts, use_reentrant), x) for m in (fused, eager))
    assert_close(actual, expected, 1e-9)


def test_saved_tensors_on_cpu_and_anomaly_detection(device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    expected = step(eager, x)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        assert_close(step(fused, x), expected, 1e-9)


def test_functional_call(device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    results = []
    for model in (fused, eager):
        parameters = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        before = {name: b.clone() for name, b in buffers.items()}
        y = torch.func.functional_call(model, (parameters, buffers), x)
        gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        results.append({"output": y, **buffers, **dict(zip(map("d {}".format, parameters), gradients, strict=True))})
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name
    assert_close(*results, 1e-9)


TRANSFORMS = {
    "grad": lambda call, p, x: torch.func.grad(lambda p: call(p, x).square().sum())(p),
    "vmap of grad": lambda call, p, x: torch.func.vmap(
        torch.func.grad(lambda p, x: call(p, x[None]).square().sum()), (None, 0)
    )(p, x),
    "vmap": lambda call, p, x: {"y": torch.func.vmap(lambda x: call(p, x[None]))(x)},
    "jvp": lambda call, p, x: {"dy": torch.func.jvp(lambda x: call(p, x), (x,), (x.cos(),))[1]},
    "vjp": lambda call, p, x: {"dx": torch.func.vjp(lambda x: call(p, x), x)[1](call(p, x))[0]},
    "jacrev": lambda call, p, x: {"J": torch.func.jacrev(lambda x: call(p, x).mean((0, 2, 3)))(x)},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name, device):
    """PyTorch's own operators, under its transforms: in evaluation, as running statistics may not be written there."""
    fused, eager = fused_and_eager(chain().eval(), device)
    x = activations(device)
    results = []
    for model in (fused, eager):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        results.append(
            TRANSFORMS[name](lambda p, x, model=model: torch.func.functional_call(model, p, (x,)), parameters, x)
        )
    assert_close(*results, 1e-9)


def test_torch_func_in_training(device):
    """Without running statistics, and compiled."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    gradients = []
    torch._dynamo.reset()
    for model in (fused, eager):
        torch.func.replace_all_batch_norm_modules_(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        gradients.append(torch.func.grad(loss)(parameters))
        if model is fused:
            compiled = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)
            gradients.append(compiled(parameters))
    assert_close(gradients[0], gradients[2], 1e-9)
    assert_close(gradients[1], gradients[2], 1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_derivatives(training, device):
    fused, eager = fused_and_eager(chain().train(training), device)
    x = activations(device)
    tangents = []
    for model in (fused, eager):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, x.sin()))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert relative_error(*tangents) < 1e-9


def test_deepcopy_is_fused_and_independent(device):
    fused, eager = fused_and_eager(ResNet(), device)
    twin = copy.deepcopy(fused)
    assert is_fused(twin)
    assert all(m.__dict__["forward"].module is m for m in twin.modules() if "forward" in m.__dict__)
    before = {name: t.clone() for name, t in fused.state_dict().items()}
    x = images(device)
    assert_close(step(twin, x), step(eager, x), 1e-9)
    assert_close(fused.state_dict(), before, 0.0)
    assert all(p.grad is None for p in fused.parameters())
    resfused.unfuse_(twin)
    assert is_fused(fused)


def test_files(device, tmp_path):
    """The whole model through pickle, torch.save, and a process that knows nothing but the file."""
    fused, eager = fused_and_eager(ResNet().eval(), device)
    x = images(device)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        for loaded in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
            assert is_fused(loaded)
            assert relative_error(loaded(x), eager(x)) < 1e-9
        torch.save({"model": fused, "x": x, "y": eager(x)}, tmp_path / "model.pt")
    code = f"""
import sys
import torch
found = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import small_networks
model = found["model"]
assert small_networks.is_fused(model)
from unittest import mock
from small_networks import kernels
with torch.no_grad(), mock.patch.object(kernels, "forward", wraps=kernels.forward) as counted:
    torch.testing.assert_close(model(found["x"]), found["y"])
assert counted.call_count == 11, counted.call_count
import resfused
resfused.unfuse_(model)
with torch.no_grad():
    torch.testing.assert_close(model(found["x"]), found["y"])
"""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_state_dicts_both_ways(device):
    fused, eager = fused_and_eager(chain(), device)
    assert list(fused.state_dict()) == list(eager.state_dict())
    other = fused_and_eager(chain(), device)[1]
    x = activations(device)
    fused.load_state_dict(other.state_dict(), strict=True)
    assert is_fused(fused)
    assert_close(step(fused, x), step(other, x), 1e-9)
    eager.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(copy.deepcopy(eager.state_dict()), strict=True, assign=True)
    assert_close(step(fused, x), step(eager, x), 1e-9)


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def one_frozen_norm(model):
    model.layer2[0].downsample[1].eval()


def constant_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def constant_stage(model):
    model.layer1.requires_grad_(False)


FREEZES = (frozen_norms, one_frozen_norm, constant_norms, constant_stage)


@pytest.mark.parametrize("freeze", FREEZES, ids=lambda f: f.__name__)
def test_freezing(freeze, device):
    """And back: a step before, one while it is frozen, one after."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    for change in (lambda m: None, freeze, lambda m: m.train().requires_grad_(True)):
        for model in (fused, eager):
            change(model)
            model.zero_grad(set_to_none=True)
        assert_close(step(fused, x), step(eager, x), 1e-9)


def test_switching_modes(device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    for mode in (True, False, True):
        assert_close(step(fused.train(mode), x), step(eager.train(mode), x), 1e-9)
        with torch.inference_mode():
            assert relative_error(fused(x), eager(x)) < 1e-9
    assert_close(fused.state_dict(), eager.state_dict(), 1e-9)


def test_parametrized_and_pruned_parameters(device):
    """Parameters that are computed from others, by a property or by a hook."""

    class Square(nn.Module):
        def forward(self, w):
            return w.square()

    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    for model in (fused, eager):
        block = model.layer1[0]
        parametrize.register_parametrization(block.bn1, "weight", Square())
        parametrizations.weight_norm(model.layer2[0].conv1)
        prune.l1_unstructured(block.bn2, "weight", amount=2)
    assert_close(step(fused, x), step(eager, x), 1e-9)
