"""What only a GPU can show: more than 2^31 elements, streams, devices, CUDA graphs, a compiled training step."""

import pytest
import torch
from oracle import FORMS, assert_close, problem, run

import resfused
import resfused.functional as fused
from resfused import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout, device, launches):
    """The last rows of a tensor whose offsets pass 32 bits, forward and backward, against the same rows alone."""
    shape = (33, 64, 1024, 1024)
    needed = 33 * 2**26 * 2 * 6
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format).normal_()
    r = torch.empty_like(x).normal_()
    stats = torch.randn(64, device=device), torch.rand(64, device=device) + 0.5
    for training in (False, True):
        y = fused.batch_norm_add_relu(x, r, *(s.clone() for s in stats), training=training)
        if training:
            mean, var = x[-1].float().mean((1, 2)), x[-1].float().var((1, 2))
            total = [torch.stack([getattr(x[i].double(), f)((1, 2)) for i in range(33)]) for f in ("mean", "var")]
            mean = total[0].mean(0)
            n = 2**20
            var = ((total[1] * (n - 1)).sum(0) + n * (total[0] - mean).square().sum(0)) / (33 * n)
        else:
            mean, var = (s.double() for s in stats)
        for i in (0, 31, 32):
            expected = reference.batch_norm_add_relu(x[i : i + 1].double(), r[i : i + 1].double(), mean, var)
            torch.testing.assert_close(y[i : i + 1].double(), expected, rtol=2**-7, atol=1e-3)
        del y
    x.requires_grad_()
    r.requires_grad_()
    y = fused.batch_norm_add_relu(x, r, *stats, training=False)
    dx, dr = torch.autograd.grad(y, (x, r), r.detach())
    for i in (0, 32):
        dz = r[i].detach().where(y[i] > 0, 0)
        assert torch.equal(dr[i], dz)
        scale = (stats[1] + 1e-5).rsqrt()[:, None, None]
        torch.testing.assert_close(dx[i].float(), dz.float() * scale, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_on_a_second_stream(form, device, launches):
    """Launches follow the current stream: a long wait ahead of them on it holds them back, and only them."""
    p = problem(form, (8, 64, 28, 28), torch.float32, device)
    expected = run(fused, p)
    stream = torch.cuda.Stream()
    late = p.tensors["input"].clone()
    q = p.with_(input=late)
    late.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(p.tensors["input"])
        actual = run(fused, q)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(actual, expected, 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_in_a_cuda_graph(form, training, device, launches):
    p = problem(form, (8, 64, 14, 14), torch.float32, device, training=training, layout="channels_last")
    static = p.tensors["input"].clone(memory_format=torch.preserve_format)
    q = p.with_(input=static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(fused, q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fused, q)
    for _ in range(2):
        static.normal_()
        graph.replay()
        expected = run(fused, q)
        for name in expected:
            if "running" not in name:
                assert torch.equal(captured[name], expected[name]), name


def test_on_a_device_that_is_not_current(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = problem(FORMS[2], (4, 16, 7, 7), torch.float32, torch.device("cuda:1"))
    with torch.cuda.device(0):
        assert_close(run(fused, p), run(reference, p, torch.float64), 1e-5)


def test_a_compiled_training_step(device):
    block = resfused.ProjectionResidualBlock(16, 32).to(device, memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(8, 16, 14, 14, device=device).to(memory_format=torch.channels_last)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
