"""Which path a tensor takes, by the function, by the environment, and without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import FORMS, assert_close, problem, run

import resfused
from resfused import functional, reference


def python(code, **environment):
    """The code's output in a fresh process, from a folder that is not the repository."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RESFUSED_BACKEND")} | environment
    env["PYTHONPATH"] = str(Path(resfused.__file__).parent.parent)
    return subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)


def test_automatic_choice(device):
    assert resfused.get_backend() == "auto"
    assert resfused.backend_for(torch.ones(2, 3, device=device)) == "triton"
    assert resfused.backend_for(torch.ones(2, 3, device="meta")) == "torch"
    assert resfused.backend_for(torch.ones(0, 3, device=device)) == "torch"


@pytest.mark.parametrize("form", FORMS)
def test_forcing_pytorch_gives_the_reference(form, device):
    p = problem(form, (4, 5, 3, 3), torch.float64, device)
    with resfused.use_backend("torch"):
        assert resfused.backend_for(p.tensors["input"]) == "torch"
        assert_close(run(functional, p), run(reference, p), 0.0)
    assert resfused.get_backend() == "auto"


def test_forcing_the_kernels(device):
    with resfused.use_backend("triton"):
        assert resfused.backend_for(torch.ones(2, 3, device=device)) == "triton"
        with pytest.raises(RuntimeError, match="'triton' was forced, but input is on meta"):
            resfused.backend_for(torch.ones(2, 3, device="meta"))
        assert functional.batch_norm_relu(torch.ones(0, 3, device=device), None, None, training=True).shape == (0, 3)


def test_unknown_names():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, native, torch, but got 'cuda'"):
        resfused.set_backend("cuda")
    assert "RESFUSED_BACKEND must be one of" in python("import resfused", RESFUSED_BACKEND="fast").stderr


def test_plain_cpu_takes_the_native_kernels():
    code = (
        "import sys, torch, resfused; x = torch.ones(2, 3); print(resfused.backend_for(x), 'triton' in sys.modules);"
        "resfused.functional.batch_norm_relu(x, None, None, training=True)"
    )
    assert python(code).stdout.split() == ["native", "False"]
    assert python(code, TRITON_INTERPRET="1").stdout.split() == ["triton", "True"]
    assert python(code, TRITON_INTERPRET="1", RESFUSED_BACKEND="native").stdout.split() == ["native", "False"]
    assert python(code, RESFUSED_BACKEND="torch").stdout.split() == ["torch", "False"]
    forced = python(code, RESFUSED_BACKEND="triton")
    assert "input is on cpu, and needs a CUDA or ROCm device, or the CPU with TRITON_INTERPRET=1" in forced.stderr


def test_forcing_the_native_kernels():
    with resfused.use_backend("native"):
        assert resfused.get_backend() == "native"
        assert resfused.backend_for(torch.ones(2, 3)) == "native"
        assert resfused.backend_for(torch.ones(0, 3)) == "torch"
        with pytest.raises(RuntimeError, match="'native' was forced, but input is on meta, and needs the CPU"):
            resfused.backend_for(torch.ones(2, 3, device="meta"))
        with pytest.raises(RuntimeError, match="'native' was forced, but input has dtype"):
            resfused.backend_for(torch.ones(2, 3, dtype=torch.int64))


def test_without_triton():
    hide = "import sys; sys.modules['triton'] = None; import torch, resfused;"
    train = (
        "b = resfused.ResidualBlock(4); b(torch.randn(2, 4, 5, 5)).sum().backward();"
        "print(b.conv1.weight.grad.shape, resfused.backend_for(torch.ones(2, 3)))"
    )
    assert python(hide + train).stdout.strip() == "torch.Size([4, 4, 3, 3]) native"
    assert python(hide + train, RESFUSED_BACKEND="torch").stdout.strip() == "torch.Size([4, 4, 3, 3]) torch"
    forced = python(hide, RESFUSED_BACKEND="triton")
    assert "needs the triton package, and it is not installed" in forced.stderr


def test_no_top_level_kernels_package():
    code = "import importlib.util, resfused.kernels as k; print(importlib.util.find_spec('kernels'), k.__name__)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    installed = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    if installed.returncode:
        pytest.skip("resfused is not installed in this environment")
    assert installed.stdout.split() == ["None", "resfused.kernels"]


def test_importing_is_quick_and_leaves_nothing(tmp_path):
    """torch._dynamo takes as long to import as torch and makes a folder, Triton as long as all of resfused.

    The kernels are defined when they are needed; then the environment is read, once.
    """
    code = (
        "import os, sys, torch, resfused; x = torch.ones(2, 3); heavy = 'torch._dynamo', 'triton', 'rich';"
        "print([m for m in heavy if m in sys.modules], os.listdir(os.environ['TMPDIR']), resfused.kernels.__name__);"
        "os.environ['TRITON_INTERPRET'] = '1'; print(resfused.backend_for(x));"
        "os.environ['TRITON_INTERPRET'] = '0'; print(resfused.backend_for(x))"
    )
    expected = "[] [] resfused.kernels\ntriton\ntriton\n"
    assert python(code, TMPDIR=str(tmp_path)).stdout == expected


def test_a_compiled_first_call_defines_the_kernels():
    code = (
        "import sys, torch, resfused; from torch._dynamo.testing import CompileCounter;"
        "x = torch.randn(4, 3); counter = CompileCounter();"
        "f = torch.compile(resfused.BatchNormReLU1d(3), backend=counter, fullgraph=True);"
        "before = 'resfused.kernels.gpu' in sys.modules; f(x); f(x);"
        "print(before, 'resfused.kernels.gpu' in sys.modules, counter.frame_count)"
    )
    assert python(code, TRITON_INTERPRET="1").stdout.split() == ["False", "True", "1"]


@pytest.mark.parametrize("x", [None, 1.0, [1.0], "cuda"], ids=str)
def test_backend_for_what_is_no_tensor(x):
    for name in ("auto", "torch"):
        with (
            resfused.use_backend(name),
            pytest.raises(TypeError, match=f"x must be a Tensor, but got {type(x).__name__}"),
        ):
            resfused.backend_for(x)
