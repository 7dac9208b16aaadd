"""The rivals' adapters: over stand-ins against float64, what they refuse, and over the real libraries on a GPU."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rival_stand_ins as stand_ins
import torch
from oracle import FORMS, assert_close, pre_activation, problem, relative_error, run

from resfused import reference

CUDNN, APEX, ATTORCH = "cuDNN graph", "apex groupbn", "attorch"
MODULES = {CUDNN: "cudnn", APEX: "apex.contrib.groupbn", ATTORCH: "attorch.batch_norm_layer"}
PACKAGES = {CUDNN: "nvidia-cudnn-frontend", APEX: "apex", ATTORCH: "attorch"}
LAYOUT = {CUDNN: "channels_last", APEX: "channels_last", ATTORCH: "contiguous"}
ADDED = FORMS[:2]
CPU = torch.device("cpu")
STREAM = 7
# The dtypes each takes, and normwise one rounding of a result.
TAKEN = [
    (CUDNN, torch.float32, 1e-5),
    (CUDNN, torch.float16, 2**-11),
    (CUDNN, torch.bfloat16, 2**-8),
    (APEX, torch.float16, 2**-11),
    (ATTORCH, torch.float32, 1e-5),
    (ATTORCH, torch.float16, 2**-11),
    (ATTORCH, torch.bfloat16, 2**-8),
]


@pytest.fixture
def made(monkeypatch):
    """Makes a rival over its stand-in, on CPU tensors."""
    from rivals import RIVALS, library

    modules = {CUDNN: stand_ins.cudnn(), APEX: stand_ins.groupbn(), ATTORCH: stand_ins.attorch_batch_norm_layer()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, MODULES[name], module)
    monkeypatch.setattr(library, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    return lambda name: RIVALS[name]()


def small(name, form=FORMS[1], shape=(3, 8, 3, 2), dtype=None, **options):
    dtype = dtype or (torch.float16 if name == APEX else torch.float32)
    return problem(form, shape, dtype, CPU, **{"layout": LAYOUT[name], **options})


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize(("name", "dtype", "tolerance"), TAKEN)
def test_output_gradients_and_running_statistics(name, form, dtype, tolerance, made):
    p = small(name, form, dtype=dtype)
    assert_close(run(made(name), p), run(reference, p, torch.float64), tolerance)


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize("name", [APEX, ATTORCH])
def test_frozen_statistics(name, form, made):
    p = small(name, form, training=False)
    with torch.no_grad():
        actual = run(made(name), replace(p, wanted=()))
    assert_close(actual, run(reference, replace(p, wanted=()), torch.float64), 2**-11)


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize("name", MODULES)
def test_a_gradient_in_another_layout(name, form, made):
    p = small(name, form)
    other = {"channels_last": torch.contiguous_format, "contiguous": torch.channels_last}[LAYOUT[name]]
    p = replace(p, dy=p.dy.contiguous(memory_format=other))
    assert_close(run(made(name), p), run(reference, p, torch.float64), 2**-11)


@pytest.mark.parametrize("name", MODULES)
def test_backwards_after_other_forwards_and_again(name, made):
    """The order of a timing of backwards alone: forwards of several sets first, every backward many times."""
    library = made(name)
    problems = [small(name) for _ in range(2)]
    leaves = [{n: t.clone().requires_grad_("running" not in n) for n, t in p.tensors.items()} for p in problems]
    outputs = [library.batch_norm_add_relu(**t, training=True, **problems[0].numbers) for t in leaves]
    for p, t, y in zip(problems, leaves, outputs, strict=True):
        expected = run(reference, p, torch.float64)
        for _ in range(2):
            wanted = {n: v for n, v in t.items() if v.requires_grad}
            gradients = torch.autograd.grad(y, list(wanted.values()), p.dy, retain_graph=True)
            for n, gradient in zip(wanted, gradients, strict=True):
                assert relative_error(gradient, expected[f"gradient of {n}"]) < 2**-11, n


def test_cudnn_plans_are_kept_and_follow_the_stream(made):
    library = made(CUDNN)
    cudnn = sys.modules["cudnn"]
    for form in ADDED:
        for numbers in ({"momentum": 0.3, "eps": 0.1}, {"momentum": 0.1, "eps": 0.01}):
            p = replace(small(CUDNN, form), numbers=numbers)
            assert_close(run(library, p), run(reference, p, torch.float64), 1e-5)
    assert len(cudnn.graphs) == 4  # two forms, two directions
    assert cudnn.streams == [STREAM] * 8
    run(library, small(CUDNN, shape=(2, 8, 3, 2)))
    assert len(cudnn.graphs) == 6


def test_cudnn_without_an_engine(made, monkeypatch):
    from rivals import Unsupported

    monkeypatch.setattr(stand_ins, "PATTERNS", set())
    p = small(CUDNN)
    with pytest.raises(Unsupported, match=r"91900.*No valid engine configs"):
        run(made(CUDNN), p)


def test_apex_keeps_a_module_for_each_form(made, monkeypatch):
    monkeypatch.setattr(stand_ins.BatchNorm2d_NHWC, "made", 0)
    library = made(APEX)
    for form in (*ADDED, *ADDED):
        run(library, small(APEX, form))
    assert stand_ins.BatchNorm2d_NHWC.made == 2


REFUSED = [
    (CUDNN, {"dtype": torch.float64}, {}, "torch.float64"),
    (CUDNN, {"layout": "contiguous"}, {}, "channels_last"),
    (CUDNN, {"shape": (3, 6, 3, 2)}, {}, "6 channels"),
    (CUDNN, {"shape": (3, 8, 6)}, {}, r"\(N, C, H, W\)"),
    (CUDNN, {"training": False}, {}, "training statistics only"),
    (CUDNN, {}, {"running_mean": None, "running_var": None}, "needs running statistics"),
    (CUDNN, {"dtype": torch.float16, "parameter_dtype": torch.float16}, {}, "weight is torch.float16"),
    (APEX, {"dtype": torch.bfloat16}, {}, "torch.bfloat16"),
    (APEX, {"layout": "contiguous"}, {}, "channels_last"),
    (APEX, {"shape": (3, 6, 3, 2)}, {}, "6 channels"),
    (APEX, {"training": False}, {}, "no gradients"),
    (APEX, {}, {"running_mean": None, "running_var": None}, "needs running statistics"),
    (APEX, {}, {"weight": None}, "needs weight and bias"),
    (ATTORCH, {"dtype": torch.float64}, {}, "torch.float64"),
    (ATTORCH, {"layout": "channels_last"}, {}, "contiguous"),
    (ATTORCH, {"training": False}, {}, "no gradients"),
    (ATTORCH, {}, {"bias": None}, "needs weight and bias"),
    (ATTORCH, {}, {"residual": torch.zeros(3, 8, 1, 1)}, "unlike input"),
    *((name, {"form": FORMS[2]}, {}, "two") for name in MODULES),
]


@pytest.mark.parametrize(("name", "options", "tensors", "reason"), REFUSED)
def test_what_a_rival_does_not_take(name, options, tensors, reason, made):
    from rivals import Unsupported

    p = small(name, **options)
    p = p.with_(**tensors)
    before = {n: t.clone() for n, t in p.tensors.items() if t is not None}
    with pytest.raises(Unsupported, match=f"{name}.*{reason}"):
        run(made(name), p)
    assert all(torch.equal(p.tensors[n], t) for n, t in before.items())


def test_tensors_on_another_device(made, monkeypatch):
    from rivals import Unsupported, library

    rivals = {name: made(name) for name in MODULES}
    monkeypatch.setattr(library, "DEVICE", "cuda")
    for name, rival in rivals.items():
        with pytest.raises(Unsupported, match="not on cuda"):
            run(rival, small(name))


def test_absent_packages_are_named(monkeypatch):
    from rivals import RIVALS, Unavailable

    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert list(RIVALS) == list(MODULES)
    for name, make in RIVALS.items():
        with pytest.raises(Unavailable, match=f"{PACKAGES[name]} cannot be imported"):
            make()


def test_apex_without_its_extension(made, monkeypatch):
    from rivals import Unavailable

    monkeypatch.delattr(sys.modules[MODULES[APEX]], "BatchNorm2d_NHWC")
    with pytest.raises(Unavailable, match="--bnp"):
        made(APEX)


def test_no_gpu(made, monkeypatch):
    from rivals import Unavailable, library

    monkeypatch.setattr(library, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in MODULES:
        with pytest.raises(Unavailable, match="needs a CUDA GPU"):
            made(name)


@pytest.mark.parametrize("function", ["batch_norm_relu", "batch_norm_add_relu", "batch_norm_add_batch_norm_relu"])
def test_the_signatures_are_the_references(function, made):
    expected = inspect.signature(getattr(reference, function)).parameters
    for name in MODULES:
        assert inspect.signature(getattr(made(name), function)).parameters == expected


def real(name):
    from rivals import RIVALS, Unavailable

    try:
        return RIVALS[name]()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 64, 3, 3), (8, 64, 28, 28), (4, 2048, 7, 7)])
@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize(("name", "dtype", "rounding"), TAKEN)
def test_the_library_itself(name, form, shape, dtype, rounding, device):
    """Within twice eager PyTorch's own error against float64, or one rounding where eager's is smaller."""
    library = real(name)
    p = problem(form, shape, dtype, device, layout=LAYOUT[name])
    # One element whose ReLU rounding has decided is more than any tolerance.
    p = replace(p, dy=p.dy.where(pre_activation(p).abs() > 1e-4, 0))
    exact = run(reference, p, torch.float64)
    eager, actual = run(reference, p), run(library, p)
    errors = {n: (relative_error(actual[n], exact[n]), relative_error(eager[n], exact[n])) for n in exact}
    wrong = {n: e for n, e in errors.items() if not e[0] <= max(2 * e[1], rounding if "running" not in n else 1e-5)}
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_the_library_itself_on_a_second_stream(name, device):
    """It follows the current stream: with a long wait ahead of it, it sees what was copied after the wait."""
    library = real(name)
    p = problem(FORMS[1], (8, 64, 28, 28), torch.float16, device, layout=LAYOUT[name])
    expected = run(library, p)
    late = p.tensors["input"].clone()
    q = p.with_(input=late)
    late.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(p.tensors["input"])
        actual = run(library, q)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(actual, expected, 1e-3)
