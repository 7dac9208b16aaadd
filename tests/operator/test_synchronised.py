"""Synchronised statistics: real processes against one with the whole batch, the phases, modules and conversions."""

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from covering import covering
from oracle import FORMS, LAYOUTS, TOLERANCE, assert_close, problem, relative_error, run
from resfused.kernels.activation import RELU
from torch import nn
from torch.library import opcheck

import resfused
from resfused import reference
from resfused.operator import ops, phases, synchronised

TESTS = Path(__file__).parents[1]
SECONDS = 150


@pytest.mark.parametrize(("backend", "processes"), [("triton", 3), ("native", 2), ("torch", 2)])
def test_processes(backend, processes, tmp_path):
    """Every case of synchronised_cases.py, on the CPU with gloo; a process's tracebacks are the message."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"RESFUSED_BACKEND": backend}
    environment |= {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "benchmarks"), str(TESTS)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-W", "error::FutureWarning:resfused", str(TESTS / "operator" / "synchronised_cases.py")]
    children, logs = [], []
    for rank in range(processes):
        logs.append(tmp_path / f"{rank}.log")
        with logs[-1].open("w") as log:
            arguments = [str(rank), str(processes), str(tmp_path / "store")]
            children.append(subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log))
    end = time.monotonic() + SECONDS
    try:
        codes = [child.wait(timeout=max(end - time.monotonic(), 0)) for child in children]
    except subprocess.TimeoutExpired:
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    told = "\n".join(f"process {rank}:\n{log.read_text()}" for rank, log in enumerate(logs))
    assert codes == [0] * processes, told


@pytest.fixture
def group_of_one():
    """This process alone; its collectives change nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


USES = {
    "one use": lambda y, twin: y,
    "two uses": lambda y, twin: 0.25 * y + 0.75 * twin,
    "second use only": lambda y, twin: twin,
}


@pytest.mark.parametrize(("form", "uses"), [*product(FORMS, ["two uses"]), *product(FORMS[1:2], USES)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_group_of_one(form, uses, backend, device, group_of_one):
    """Both norms with their own numbers, gradients of both uses of the output, as in one process."""

    def node(x, residual, own, residual_own=None):
        twice = uses != "one use"
        return USES[uses](
            *synchronised.normalise_add_activate(x, residual, own, residual_own, RELU, group_of_one, twice)
        )

    def norm(mean, var, weight, bias, momentum, eps):
        return synchronised.Norm(weight, bias, mean, var, momentum, eps)

    def two(x, r, mean, var, r_mean, r_var, weight, bias, r_weight, r_bias, training, **numbers):
        momentum, eps, *residual_numbers = numbers.values()
        own = norm(mean, var, weight, bias, momentum, eps)
        return node(x, r, own, norm(r_mean, r_var, r_weight, r_bias, *residual_numbers))

    implementation = SimpleNamespace(
        batch_norm_relu=lambda x, *vectors, momentum, eps: node(x, None, norm(*vectors[:4], momentum, eps)),
        batch_norm_add_relu=lambda x, r, *vectors, momentum, eps: node(x, r, norm(*vectors[:4], momentum, eps)),
        batch_norm_add_batch_norm_relu=two,
    )
    p = problem(form, (4, 3, 5, 2), torch.float64, device)
    with resfused.use_backend(backend):
        assert_close(run(implementation, p), run(reference, p), 1e-12)


def test_a_group_without_values(group_of_one):
    own = synchronised.Norm(None, None, None, None, 0.1, 1e-5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        synchronised.normalise_add_activate(torch.empty(0, 3, 2), None, own, None, RELU, group_of_one)


def test_merge_of_processes():
    """Against Chan's formula in float64: the mean within a unit in the last place, where it is far over std."""
    counts = torch.tensor([7.0, 3.0, 0.0, 11.0, 1.0]).view(-1, 1, 1)
    stats = torch.rand(5, 4, 64) * 100
    stats[:, 0::2] += 1e4
    stats[2] = 0
    total, means, m2s = synchronised._merge(counts, stats)
    assert total == 22
    c, m, m2 = counts.double(), stats[:, 0::2].double(), stats[:, 1::2].double()
    exact = (c * m).sum(0) / 22
    # From 2^13 to 2^14 a float32 has 2^-10 to the next.
    assert (means.double() - exact).abs().max() < 2**-10
    assert relative_error(m2s, (m2 + c * (m - exact).square()).sum(0)) < 1e-6


def affine(p):
    get = p.tensors.get
    return get("weight"), get("bias"), p.form == FORMS[2], get("residual_weight"), get("residual_bias"), *RELU


def phase_by_phase(phase, p):
    """One process's node in the four phases, with the results of ``oracle.run``."""
    x, residual = p.tensors["input"], p.tensors.get("residual")
    own = affine(p)
    norm_residual = own[2]
    local = phase.local_statistics(x, residual, norm_residual)
    count = x.numel() // x.shape[1]
    stats = local.clone()
    stats[1::2] = (
        local[1::2] / count + torch.tensor([[0.1], [0.15]], dtype=torch.float64)[: len(local) // 2].to(local)
    ).rsqrt()
    y, mask = phase.normalise(x, residual, stats, *own, p.form == FORMS[1])
    kept = residual if norm_residual else None
    results = {"output": y}
    wanted = [residual is not None and not norm_residual, True, True, norm_residual, norm_residual]
    dtype = None if residual is None else residual.dtype
    sums, *gradients = phase.local_sums(p.dy, None, x, kept, dtype, mask, stats, *own, wanted)
    dz = gradients.pop(0) if wanted[0] else None
    names = ("weight", "bias", "residual_weight", "residual_bias")
    results |= {f"gradient of {name}": g for name, g in zip(names, gradients, strict=False)}
    dx, *dresidual = phase.input_gradients(
        p.dy, None, dz, x, kept, mask, stats, sums / count, *own, [True, norm_residual]
    )
    results["gradient of input"] = dx
    for gradient in (*dresidual, dz):
        if gradient is not None:
            results["gradient of residual"] = gradient
    return results, local


PHASES = {"kernels": ops, "torch": phases}


@covering(form=FORMS, layout=LAYOUTS, phase=PHASES)
def test_phases(form, layout, phase, device, small_launches):
    """Many programs and ragged tiles, small planes walked by columns, and other strides in between."""
    for shape, dtype in (((4, 18, 3, 5), torch.float64), ((40, 3, 7, 7), torch.float32), ((9, 5), torch.float64)):
        p = problem(form, shape, dtype, device, layout=layout)
        if shape == (9, 5):
            p = p.with_(input=p.tensors["input"].t().contiguous().t())
        expected = {k: v for k, v in run(reference, p, torch.float64).items() if "running" not in k}
        actual, local = phase_by_phase(PHASES[phase], p)
        assert_close(actual, expected, TOLERANCE[dtype])
        activations = [p.tensors["input"], p.tensors.get("residual")][: len(local) // 2]
        axes = [d for d in range(len(shape)) if d != 1]
        for (mean, m2), x in zip(local.view(-1, 2, shape[1]), activations, strict=True):
            values = x.numel() // shape[1]
            assert_close(
                {"mean": mean, "M2": m2},
                {"mean": x.double().mean(axes), "M2": x.double().var(axes, correction=0) * values},
                TOLERANCE[dtype],
            )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(form, layout, device):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    p = problem(form, (3, 6, 4, 2), torch.float32, device, layout=layout)
    x, residual = p.tensors["input"], p.tensors.get("residual")
    own = affine(p)
    two = own[2]
    opcheck(ops.local_statistics, (x, residual, two), test_utils=checks)
    stats = ops.local_statistics(x, residual, two).abs() + 0.5
    masked = form == FORMS[1]
    opcheck(ops.normalise, (x, residual, stats, *own, masked), test_utils=checks)
    _, mask = ops.normalise(x, residual, stats, *own, masked)
    kept, dtype = residual if two else None, None if residual is None else residual.dtype
    wanted = [form == FORMS[1], True, True, two, two]
    for fork in (p.dy, None):
        arguments = (p.dy, fork, x, kept, dtype, mask, stats, *own, wanted)
        opcheck(ops.local_sums, arguments, test_utils=checks)
        sums, *gradients = ops.local_sums(*arguments)
        dz = gradients[0] if wanted[0] else None
        arguments = (p.dy, fork, dz, x, kept, mask, stats, sums, *own, [True, two])
        opcheck(ops.input_gradients, arguments, test_utils=checks)


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_a_batch_norm(training, device):
    """Without process groups, as torch.nn.SyncBatchNorm: the ordinary fused path."""
    torch.manual_seed(1)
    x, r = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64, device=device)
    kinds = (resfused.SyncBatchNormReLU, (x,)), (resfused.SyncBatchNormAddReLU, (x, r)), (nn.SyncBatchNorm, (x, r))
    for kind, inputs in kinds:
        norm = kind(5, dtype=torch.float64, device=device).train(training)
        eager = nn.BatchNorm2d(5, dtype=torch.float64, device=device).train(training)
        norm.load_state_dict(eager.state_dict())
        y = resfused.tail(norm, *inputs) if kind is nn.SyncBatchNorm else norm(*inputs)
        expected = (eager(x) + sum(inputs[1:])).relu()
        assert relative_error(y, expected) < 1e-12
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_no_channels():
    with pytest.raises(ValueError, match="channels should be non-zero"):
        resfused.SyncBatchNormReLU(5)(torch.ones(2, 0, 3))
    with pytest.raises(ValueError, match="at least 2D"):
        resfused.SyncBatchNormReLU(5)(torch.ones(5))


CONVERTED = {
    "BatchNormReLU2d": resfused.SyncBatchNormReLU,
    "BatchNormAddReLU3d": resfused.SyncBatchNormAddReLU,
    "SyncBatchNormReLU": resfused.SyncBatchNormReLU,
}


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("name", CONVERTED)
def test_conversion(name, settings):
    norm = getattr(resfused, name)(5, eps=0.1, **settings).eval()
    model = nn.ModuleDict({"deep": nn.Sequential(nn.BatchNorm1d(5), norm), "conv": nn.Conv2d(1, 1, 1)})
    group = object()
    assert resfused.convert_sync_batchnorm(model, group) is model
    plain, converted = model["deep"]
    assert type(plain) is nn.SyncBatchNorm
    assert type(converted) is CONVERTED[name]
    for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(converted, attribute) == getattr(norm, attribute), attribute
    for key, value in (*norm.named_parameters(), *norm.named_buffers()):
        assert getattr(converted, key) is value, key
    assert converted.state_dict().keys() == norm.state_dict().keys()
    assert plain.process_group is converted.process_group is group
    assert type(resfused.convert_sync_batchnorm(norm)) is CONVERTED[name]


@pytest.mark.parametrize("name", [*CONVERTED, "SyncBatchNormAddReLU"])
def test_conversion_by_pytorch_is_refused(name):
    """It would drop the activation. What it came to first stays converted, and ours then does the rest."""
    norm = getattr(resfused, name)(5)
    attributes, tensors = set(norm.__dict__), [*norm.parameters(), *norm.buffers()]
    model = nn.Sequential(nn.BatchNorm2d(5), norm)
    for target in (model, norm):
        with pytest.raises(RuntimeError, match=f"drop the activation of {name}: use resfused.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(target)
    assert model[1] is norm
    assert set(norm.__dict__) == attributes
    assert all(a is b for a, b in zip(tensors, [*norm.parameters(), *norm.buffers()], strict=True))
    assert isinstance(resfused.convert_sync_batchnorm(model)[1], nn.SyncBatchNorm)
    assert not hasattr(norm, "qconfig")
    norm.qconfig = "mine"
    assert norm.qconfig == "mine"


def test_a_hook_on_a_fused_norm_fires_once():
    norm = resfused.SyncBatchNormReLU(5)
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = norm(torch.randn(4, 5, 3))
    assert len(seen) == 1
    assert seen[0] is y
