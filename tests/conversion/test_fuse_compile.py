"""Fused models under what traces them: torch.compile, torch.export, ONNX, torch.fx, torch.jit.trace, CUDA graphs."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from oracle import assert_close, relative_error
from small_networks import ResNet, activations, chain, fused_and_eager, images, kernels, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import resfused


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend, device):
    """One graph for all training steps, one for evaluation; pairs are handed on inside."""
    fused, eager = fused_and_eager(ResNet(), device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for _ in range(2):
        x = images(device)
        with mock.patch.object(kernels, "backward", wraps=kernels.backward) as counted:
            actual = step(compiled, x)
        assert_close(actual, step(eager, x), 1e-9)
        assert counter.frame_count == 1
    assert counted.call_count == 11
    assert sum(call.args[1] is not None for call in counted.call_args_list) == 3
    for model in (compiled, eager):
        model.eval()
    with torch.no_grad():
        assert relative_error(compiled(x), eager(x)) < 1e-9
        assert counter.frame_count == 2
        assert relative_error(compiled(x + 1), eager(x + 1)) < 1e-9
    compiled.train()
    eager.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(step(compiled, x), step(eager, x), 1e-9)


def test_compile_of_a_part_and_module_compile(device):
    """A compiled block inside a fused model is called as a whole: it takes and gives one tensor."""
    fused, eager = fused_and_eager(chain(), device)
    fused.layer2[0].compile(backend="aot_eager", fullgraph=True)
    x = activations(device)
    assert_close(step(fused, x), step(eager, x), 1e-9)
    fused, eager = fused_and_eager(chain(), device)
    fused.layer1 = torch.compile(fused.layer1, backend="aot_eager", fullgraph=True)
    assert_close(step(fused, x), step(eager, x), 1e-9)


def test_compiled_code_follows_changes(device):
    """What the generated code takes for granted is guarded in compiled code too."""
    fused, eager = fused_and_eager(chain(), device)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    x = activations(device)
    step(compiled, x)
    for model in (fused, eager):
        model.load_state_dict(eager.state_dict())
        model.layer1[0].relu = nn.SiLU()
    assert_close(step(compiled, x), step(eager, x), 1e-9)
    for model in (fused, eager):
        model.layer2[0].bn1.eps = 0.5
    assert_close(step(compiled, x), step(eager, x), 1e-9)


def test_compile_with_autocast(device):
    fused, eager = fused_and_eager(chain(), device, torch.float32)
    x = activations(device, torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    exact = copy.deepcopy(eager).double()(x.double())
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = compiled(x), eager(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert relative_error(y, exact) <= 2 * relative_error(expected, exact)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    """Any batch size, saved and loaded; the program has the fused operators."""
    fused, eager = fused_and_eager(ResNet().eval(), device)
    x = images(device)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
        assert sum("resfused" in str(node.target) for node in program.graph.nodes) == 11
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for x in (images(device), images(device, number=3)):
            assert relative_error(loaded(x), eager(x)) < 1e-9


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_gradients_enabled(strict, device):
    """As it is called by default; and named inputs keep their names."""
    fused, eager = fused_and_eager(chain().eval(), device)
    x = activations(device)
    program = torch.export.export(fused, (), {"input": x}, strict=strict)
    assert relative_error(program.module()(input=x), eager(x)) < 1e-9


def test_export_for_training(device):
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    model = torch.export.export(fused, (x,), strict=False).module()
    y, expected = model(x), eager(x)
    assert relative_error(y, expected) < 1e-9
    for name, buffer in eager.named_buffers():
        assert relative_error(dict(model.named_buffers())[name], buffer) < 1e-9


@pytest.mark.parametrize("which", ["fused", "unfused"])
def test_onnx_has_standard_operators_only(which, device):
    pytest.importorskip("onnx", reason="needs the onnx package")
    pytest.importorskip("onnxscript", reason="needs the onnxscript package")
    fused, _ = fused_and_eager(ResNet().eval(), device, torch.float32)
    if which == "unfused":
        resfused.unfuse_(fused)
    x = images(device, torch.float32)
    with resfused.use_backend("torch"):
        program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
    operators = [(node.domain, node.op_type) for node in program.model_proto.graph.node]
    assert {domain for domain, _ in operators} == {""}
    kinds = [kind for _, kind in operators]
    assert kinds.count("Conv") == 13
    assert kinds.count("Relu") == 11
    assert kinds.count("Add") == 4


def test_onnx_numbers(device):
    """The exported graph, evaluated by onnx's own reference implementation."""
    onnx_reference = pytest.importorskip("onnx.reference", reason="needs the onnx package")
    pytest.importorskip("onnxscript", reason="needs the onnxscript package")
    fused, eager = fused_and_eager(chain().eval(), device, torch.float32)
    x = activations(device, torch.float32)
    with resfused.use_backend("torch"):
        program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
    (y,) = onnx_reference.ReferenceEvaluator(program.model_proto).run(None, {"input": x.cpu().numpy()})
    assert relative_error(torch.from_numpy(y), eager.double()(x.double()).cpu()) < 1e-5


def test_symbolic_trace_gives_the_plain_graph(device):
    fused, eager = fused_and_eager(ResNet(), device)
    traced, plain = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(eager)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in plain.graph.nodes]
    x = images(device)
    assert_close(step(traced, x), step(eager, x), 1e-9)


def test_jit_trace_gives_the_plain_graph(device):
    fused, eager = fused_and_eager(chain().eval(), device)
    x = activations(device)
    traced = torch.jit.trace(fused, (x,))
    assert not any("resfused" in node.kind() or "PythonOp" in node.kind() for node in traced.inlined_graph.nodes())
    assert relative_error(traced(x), eager(x)) < 1e-12


def test_meta_tensors(device):
    """Shapes without values; a model fused on the meta device, then given memory and values, or tensors that have."""
    fused, eager = fused_and_eager(chain(), device)
    x = activations(device)
    with torch.device("meta"):
        model = chain().double()
    resfused.fuse_(model)
    assert model(x.to("meta")).shape == eager(x).shape
    model = model.to_empty(device=device)
    model.load_state_dict(fused.state_dict())
    eager.load_state_dict(fused.state_dict())
    assert_close(step(model, x), step(eager, x), 1e-9)
    with torch.device("meta"):
        model = chain().double()
    resfused.fuse_(model)
    model.load_state_dict(eager.state_dict(), assign=True)
    assert_close(step(pickle.loads(pickle.dumps(model)), x), step(eager, x), 1e-9)


@pytest.mark.gpu
def test_reduce_overhead(device):
    """Compiled training steps, warmed up, recorded in CUDA graphs and replayed."""
    fused, eager = fused_and_eager(ResNet(), device)
    compiled = torch.compile(fused, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = images(device, number=8)
        torch.compiler.cudagraph_mark_step_begin()
        # The next step writes to the same memory.
        actual = {name: tensor.clone() for name, tensor in step(compiled, x).items()}
        assert_close(actual, step(eager, x), 1e-9)


@pytest.mark.gpu
def test_graphed_callables(device):
    """Forward and backward captured once, replayed with other images."""
    fused, eager = fused_and_eager(ResNet(), device)
    graphed = torch.cuda.make_graphed_callables(fused, (images(device, number=8).requires_grad_(),))
    # Steps to warm up have updated the statistics.
    eager.load_state_dict(fused.state_dict())
    for _ in range(3):
        x = images(device, number=8)
        actual = {name: tensor.clone() for name, tensor in step(graphed, x).items()}
        assert_close(actual, step(eager, x), 1e-9)
