"""Spans of kernels, what a step's time is made of, and the counters' output."""

import sys
from itertools import pairwise

import pytest
import torch
from count import node_passes
from measure import counters, kernel_profile
from measure.measuring import Measuring
from measure.network_timing import Workload
from measure.node_timing import Comparison
from measure.spans import Span, busy, spans
from measure.timing import Deadline
from record.results import KernelTime, Run, load
from rich.console import Console
from workloads import passes
from workloads.nodes import FORMS, Node


def test_time_with_at_least_one_kernel():
    found = [Span("a", 0, 4), Span("b", 1, 2), Span("c", 3, 6), Span("d", 8, 9)]
    assert busy(found) == 7
    assert busy([]) == 0


def test_summary_of_steps():
    found = [
        Span("_apply_kernel", 0, 4), Span("sm90_xmma_fprop_implicit_gemm_bf16", 4, 10),
        Span("_apply_kernel", 12, 16), Span("sm90_xmma_fprop_implicit_gemm_bf16", 16, 20),
    ]  # fmt: skip
    profile = kernel_profile.summary(Workload("resnet50", "training", 8, 32), "resfused", found, steps=2)
    assert (profile.span_ms, profile.idle_ms) == (10, 1)
    assert profile.kinds_ms == {"resfused": 4, "convolution, matrix product": 5}
    assert profile.longest == [("sm90_xmma_fprop_implicit_gemm_bf16", 1, 5), ("_apply_kernel", 1, 4)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_reduce_kernel", "resfused"),
        ("triton_red_fused__native_batch_norm_legit_functional_3", "Inductor"),
        ("void cudnn::bn_fw_tr_1C11_singleread_sm80<float>", "batch norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<c10::BFloat16>", "batch norm"),
        ("void cudnn::ops::nchwToNhwcKernel<float>", "other"),
        ("void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<3>>", "optimiser"),
        ("Memset (Device)", "copy, fill"),
        ("void at::native::max_pool_backward_nhwc<c10::BFloat16>", "pooling"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel_impl>",
            "elementwise, reduction",
        ),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kernel_profile.kind_of(name) == kind


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
def test_least_passes_are_those_that_are_counted(form):
    """Of every kernel, from its loads and stores; all traffic of activations is the least there is."""
    shape = (2, 64, 4, 4)
    for way, least in ((node_passes.SEPARATE, passes.SEPARATE_LAUNCHES), (node_passes.ONE_LAUNCH, passes.ONE_LAUNCH)):
        counted = {}
        for phase in (node_passes.FORWARD, node_passes.BACKWARD):
            for launch in node_passes.count_node(form, phase, way, "channels_last", torch.bfloat16, shape):
                name = launch.kernel.removeprefix("_").removesuffix("_kernel")
                counted[name] = launch.activation
        assert counted == {kernel: p.activations + p.masks / 16 for kernel, p in least[form].items()}


def test_bytes_of_passes():
    assert passes.two_phases("norm+add+relu", "both").bytes(80, torch.float32) == 80 * (10 * 4 + 2 / 8)
    assert passes.two_phases("norm+relu", "forward") == passes.Passes(3)
    assert passes.two_phases("norm+add(norm)+relu", "backward") == passes.Passes(8)


@pytest.mark.interpreter
def test_spans_of_interpreted_kernels(device):
    from workloads.problems import problem

    from resfused import functional

    p = problem("norm+relu", (2, 8, 2, 2), torch.float32, "channels_last", device)
    found = spans(lambda: p.backward(p.forward(functional)), device)
    kernels = [kernel_profile.kernel_of(s.name) for s in found]
    assert kernels == ["statistics", "normalise", "reduce", "apply"]
    assert all(a.end <= b.start for a, b in pairwise(found))


@pytest.mark.gpu
def test_spans_of_a_gpu(device):
    from workloads.problems import problem

    from resfused import functional

    p = problem("norm+relu", (2, 8, 2, 2), torch.float32, "channels_last", device)
    work = lambda: p.backward(p.forward(functional))  # noqa: E731
    work()
    kernels = {kernel_profile.kernel_of(s.name) for s in spans(work, device)}
    assert {"statistics", "normalise", "reduce", "apply"} <= kernels


NCU = """==PROF== Connected to process 1
hello
"ID","Process ID","Kernel Name","Device","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","byte","byte"
"0","1","_statistics_kernel(args)","0","1,024","16"
"1","1","_normalise_kernel","0","2048.0","1000"
==PROF== Disconnected from process 1
"""


def test_output_of_ncu():
    assert list(counters.parse(NCU)) == [
        ("_statistics_kernel", 1024, 16), ("_normalise_kernel", 2048, 1000),
    ]  # fmt: skip
    assert list(counters.parse("==ERROR== no permission\n")) == []


def test_counted_bytes_go_to_their_kernels():
    times = [t for t in kernel_times() if t.kernel in ("statistics", "normalise")]
    found = kernel_profile.counted(times, counters.parse(NCU))
    assert [(t.kernel, t.dram_bytes) for t in found] == [("statistics", 1040), ("normalise", 3048)]
    with pytest.raises(counters.CountersError, match="3 kernels were timed, and the counters saw 2"):
        kernel_profile.counted([*times, times[0]], counters.parse(NCU))


def kernel_times():
    place = ("norm+relu", 8, 2, 2, 2, "float32", "channels_last")
    return [
        KernelTime([1.0], *place, phase, 1e6, 4000.0, kernel, None)
        for phase, kernel in (("forward", "statistics"), ("forward", "normalise"), ("backward", "reduce"))
    ]


def test_counters_of_a_program(tmp_path, monkeypatch):
    """With a program in the place of ncu that prints what it prints, and the command's own line after it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(counters.CountersError, match="ncu, of NVIDIA's Nsight Compute, is not on the PATH"):
        counters.dram_bytes(["true"], 5)
    fake = tmp_path / "ncu"
    for body, message in (
        (
            "print('==ERROR== REFUSED'); sys.exit(9)",
            "ncu ended with 9 and 0 launches: ==ERROR== REFUSED",
        ),
        ("import time; time.sleep(60)", "ncu was not done after 1 s"),
    ):
        fake.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        fake.chmod(0o755)
        with pytest.raises(counters.CountersError, match=message):
            counters.dram_bytes(["true"], 1)
    fake.write_text(f"#!{sys.executable}\nimport sys\nassert sys.argv[-2:] == ['program', 'x']\nprint({NCU!r})\n")
    assert len(counters.dram_bytes(["program", "x"], 20)) == 2


@pytest.mark.interpreter
def test_kernels_of_nodes(tmp_path, device):
    m = Measuring(Run(tmp_path / "here.json", {}), 100.0, Deadline(5), device, True, Console(quiet=True))
    node = Node("norm+relu", 16, 4, 4, 1)
    c = Comparison([node], [8], torch.bfloat16, "channels_last", device, repetitions=2)
    kernel_profile.profile_nodes(c, m, counters=False)
    (found,) = load([m.run.path]).values()
    kernels = {t.kernel: t for t in found.of(KernelTime)}
    assert set(kernels) == {"statistics", "normalise", "reduce", "apply"}
    assert all(len(t.samples_ms) == 2 and min(t.samples_ms) > 0 for t in kernels.values())
    assert kernels["apply"].least_bytes == 3 * 2 * node.elements * 8
