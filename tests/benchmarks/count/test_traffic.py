"""The traffic benchmark: its recorder against closed forms, eager's model, and the passes that launches may take."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import commands
import pytest
import torch
import triton
import triton.language as tl
from count import node_passes, recorder, traffic
from resfused.kernels.activation import RELU, activation_of
from resfused.kernels.geometry import Geometry
from resfused.kernels.gpu import launch_table
from torch import nn
from workloads import nodes

from resfused import Fused, functional, reference

pytestmark = pytest.mark.interpreter

HALF = torch.bfloat16


@triton.jit
def _copy_kernel(source, target, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i // STRIDE, mask=i < n), mask=i < n)


@triton.jit
def _count_kernel(counter, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(counter + i, 1, mask=i < n)


@triton.jit
def _outside_kernel(source, other):
    tl.store(other, tl.load(source))
    tl.store(source, tl.load(source + 1))


def test_masked_lanes_do_not_count() -> None:
    source, target = torch.randn(64), torch.zeros(64)
    with recorder.record() as launches:
        _copy_kernel[(3,)](source, target, 37, STRIDE=1, BLOCK=16)
    assert torch.equal(target[:37], source[:37])
    assert not target[37:].any()
    (launch,) = launches
    assert launch.kernel == "_copy_kernel"
    assert [(a.name, a.read, a.written) for a in launch.arguments] == [("source", 37 * 4, 0), ("target", 0, 37 * 4)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_an_element_read_twice_counts_once(dtype: torch.dtype) -> None:
    source, target = torch.ones(16, dtype=dtype), torch.zeros(64, dtype=dtype)
    with recorder.record() as launches:
        _copy_kernel[(4,)](source, target, 64, STRIDE=4, BLOCK=16)
    read, written = launches[0].arguments
    assert (read.read, written.written) == (16 * dtype.itemsize, 64 * dtype.itemsize)


def test_an_atomic_reads_and_writes() -> None:
    counter = torch.zeros(8, dtype=torch.int32)
    with recorder.record() as launches:
        _count_kernel[(1,)](counter, 5, BLOCK=8)
    assert counter.tolist() == [1] * 5 + [0] * 3
    (argument,) = launches[0].arguments
    assert (argument.read, argument.written) == (20, 20)


def test_launches_are_counted_apart_and_only_inside() -> None:
    source, target = torch.randn(16), torch.zeros(16)
    with recorder.record() as launches:
        _copy_kernel[(1,)](source, target, 16, STRIDE=1, BLOCK=16)
        _copy_kernel[(1,)](source, target, 8, STRIDE=1, BLOCK=16)
    _copy_kernel[(1,)](source, target, 16, STRIDE=1, BLOCK=16)
    assert [launch.arguments[0].read for launch in launches] == [64, 32]


def test_an_access_outside_the_arguments_is_an_error() -> None:
    memory = torch.zeros(4)
    with recorder.record(), pytest.raises(IndexError, match="_outside_kernel accessed 4 bytes outside"):
        _outside_kernel[(1,)](memory[:1], memory[2:])


def test_without_execute_nothing_runs() -> None:
    source, target = torch.ones(16), torch.zeros(16)
    with recorder.record(execute=False) as launches:
        _copy_kernel[(1,)](source, target, 16, STRIDE=1, BLOCK=16)
    assert not target.any()
    assert [(a.nbytes, a.read, a.written) for a in launches[0].arguments] == [(64, 0, 0)] * 2


def test_kernels_that_are_not_interpreted_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resfused.kernels.gpu.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), recorder.record():
        pass


@pytest.mark.parametrize(
    ("form", "forward", "backward", "eval"),
    [(nodes.NORM_RELU, 5, 8, 4), (nodes.NORM_ADD_RELU, 8, 8, 7), (nodes.NORM_ADD_NORM_RELU, 11, 13, 9)],
)
def test_passes_of_eager(form: str, forward: int, backward: int, eval: int) -> None:
    expected = [forward, backward, backward + 3, eval]
    assert [node_passes.eager_passes(form, phase) for phase in node_passes.PHASES] == expected


# What the derivative needs decides: nothing, a bit where the residual is not kept, or z, for which it is.
@pytest.mark.parametrize(
    ("activation", "form", "forward", "backward", "kept"),
    [
        ("identity", nodes.NORM_RELU, 3, 5, 1),
        ("relu6", nodes.NORM_RELU, 3, 5, 1),
        ("silu", nodes.NORM_RELU, 3, 5, 1),
        ("identity", nodes.NORM_ADD_RELU, 4, 5, 1),
        ("relu6", nodes.NORM_ADD_RELU, 4.0625, 6.125, 1 + 1 / 32),
        ("silu", nodes.NORM_ADD_RELU, 4, 7, 2),
        ("identity", nodes.NORM_ADD_NORM_RELU, 5, 8, 2),
        ("silu", nodes.NORM_ADD_NORM_RELU, 5, 8, 2),
    ],
)
def test_passes_of_any_activation(activation: str, form: str, forward: float, backward: float, kept: float) -> None:
    named = activation_of(activation)
    for phase, most in ((node_passes.FORWARD, forward), (node_passes.BACKWARD, backward)):
        launches = node_passes.count_node(
            form, phase, node_passes.SEPARATE, "channels_last", HALF, (2, 24, 8, 12), named
        )
        assert most - 0.07 <= sum(launch.activation for launch in launches) <= most
    assert node_passes.kept(functional, form, named) == kept


def test_passes_of_eager_with_an_activation() -> None:
    for activation, backward in (("identity", 5), ("silu", 8)):
        assert node_passes.eager_passes(nodes.NORM_ADD_RELU, "backward", activation_of(activation)) == backward


@pytest.mark.parametrize("layout", node_passes.LAYOUTS)
@pytest.mark.parametrize(
    ("form", "way", "forward", "backward", "forked"),
    [
        (nodes.NORM_RELU, node_passes.SEPARATE, 3, 5, 7),
        (nodes.NORM_ADD_RELU, node_passes.SEPARATE, 4.0625, 6.125, 7.125),
        (nodes.NORM_ADD_NORM_RELU, node_passes.SEPARATE, 5.0625, 8.2, 10.2),
        (nodes.NORM_RELU, node_passes.ONE_LAUNCH, 2, 3, 4),
        (nodes.NORM_ADD_RELU, node_passes.ONE_LAUNCH, 3.0625, 4.0625, 5.0625),
        (nodes.NORM_ADD_NORM_RELU, node_passes.ONE_LAUNCH, 3.0625, 5.0625, 6.0625),
    ],
)
def test_passes_of_our_launches(
    form: str, way: str, forward: float, backward: float, forked: float, layout: str
) -> None:
    node = traffic.node_traffic(form, way, layout, HALF, (2, 24, 8, 12))
    assert node.activation(node_passes.FORWARD) <= forward
    assert node.activation(node_passes.BACKWARD) <= backward
    assert node.activation(node_passes.FORKED) <= forked
    assert node.activation(node_passes.EVAL) == (2 if form == nodes.NORM_RELU else 3)
    most = 2 if way == node_passes.SEPARATE else 1
    assert [len(launches) for launches in node.launches.values()] == [most, most, most, 1]


@pytest.mark.parametrize("form", nodes.FORMS)
@pytest.mark.parametrize("forked", [False, True])
def test_fuse_reports_the_passes_that_are_counted(form: str, forked: bool) -> None:
    node = traffic.node_traffic(form, node_passes.SEPARATE, "channels_last", HALF, (2, 24, 8, 12))
    phases = node_passes.FORWARD, node_passes.FORKED if forked else node_passes.BACKWARD
    saved = sum(node.eager[phase] - node.activation(phase) for phase in phases)
    assert Fused("", form, (), forked, in_training=True).passes_saved == saved


@pytest.mark.parametrize("layout", node_passes.LAYOUTS)
def test_channels_that_are_no_multiple_of_eight(layout: str) -> None:
    for form, forward, backward in zip(nodes.FORMS, (3, 4.0625, 5.0625), (5, 6.125, 8.2), strict=True):
        node = traffic.node_traffic(form, node_passes.SEPARATE, layout, HALF, (2, 13, 7, 7))
        assert node.activation(node_passes.FORWARD) <= forward + 0.5
        assert node.activation(node_passes.BACKWARD) <= backward + 0.5


@pytest.mark.parametrize("layout", node_passes.LAYOUTS)
@pytest.mark.parametrize("form", nodes.FORMS)
def test_nothing_but_launches_moves_an_activation(form: str, layout: str) -> None:
    shape = (2, 24, 8, 12)
    activations = node_passes._activations(layout, HALF, shape, True, 3)
    with recorder.record(execute=False), torch.profiler.profile(record_shapes=True) as profile:
        y, inputs = node_passes._forward(functional, form, RELU, True, activations[:2])
        torch.autograd.grad(y, inputs, activations[2])
    operators = {e.name for e in profile.events() or () if list(shape) in e.input_shapes and e.name.startswith("aten")}
    assert operators <= {"aten::empty_like", "aten::new_empty", "aten::detach"}


@pytest.mark.parametrize("layout", node_passes.LAYOUTS)
def test_traffic_from_a_reduced_shape_is_that_of_the_shape(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 16, 10, 14)
    whole = [
        node_passes.count_node(nodes.NORM_ADD_RELU, phase, way, layout, HALF, shape)
        for way, phase in product(node_passes.WAYS, node_passes.PHASES)
    ]
    monkeypatch.setattr(node_passes, "COUNTED_ELEMENTS", 1000)
    assert node_passes.reduced(shape, layout) != shape
    small = [
        node_passes.count_node(nodes.NORM_ADD_RELU, phase, way, layout, HALF, shape)
        for way, phase in product(node_passes.WAYS, node_passes.PHASES)
    ]
    assert small == whole


def test_partial_results_have_the_size_of_the_real_launch() -> None:
    """Statistics write each program's mean and M2 of its channels, and each block's counts; the last to arrive reads
    them, and the running statistics, and writes these and the batch's.
    """
    geometry = Geometry(True, 1, 256 * 49, 512)
    launch = launch_table.streaming("statistics", geometry)
    programs = launch.programs
    statistics, _ = node_passes.count_node(
        nodes.NORM_RELU, node_passes.FORWARD, node_passes.SEPARATE, "channels_last", HALF, (256, 512, 7, 7)
    )
    activation = geometry.values * 512 * 2
    partials = programs * (2 * 512 + launch.channel_blocks)
    assert statistics.channel_written * activation == pytest.approx(
        (partials + 2 * 512 + 2 * 512 + launch.merge.counters) * 4, rel=0.01
    )
    assert statistics.channel_read * activation == pytest.approx(
        (partials + 2 * 512 + launch.merge.counters) * 4, rel=0.01
    )


@pytest.mark.parametrize(
    ("network", "norm_relu", "identity", "projection", "norms"),
    [("resnet18", 9, 5, 3, 20), ("resnet50", 33, 12, 4, 53)],
)
def test_nodes(network: str, norm_relu: int, identity: int, projection: int, norms: int) -> None:
    found = nodes.NETWORKS[network]().nodes
    counts = [sum(node.count for node in found if node.form == form) for form in nodes.FORMS]
    assert counts == [norm_relu, identity, projection]
    assert sum(node.count * node.norms for node in found) == norms
    # Every block but the last has a block behind it.
    assert sum(node.count for node in found if node.forked) == identity + projection - 1


@pytest.mark.parametrize(("network", "depths"), [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3))])
def test_nodes_are_the_norms_of_the_network(network: str, depths: tuple[int, ...]) -> None:
    """Against hooks on the norms of a network built of the plain blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        outer = (64 << stage) * (4 if network == "resnet50" else 1)
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if network == "resnet50":
                layers.append(reference.BottleneckResidualBlock(channels, outer, stride))
            elif channels != outer:
                layers.append(reference.ProjectionResidualBlock(channels, outer, stride))
            else:
                layers.append(reference.ResidualBlock(channels))
            channels = outer
    model = nn.Sequential(*layers).to("meta")
    normalised: Counter[tuple[int, ...]] = Counter()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, __: normalised.update([tuple(inputs[0].shape[1:])]))
    model(torch.empty(2, 3, 224, 224, device="meta"))
    expected: Counter[tuple[int, ...]] = Counter()
    for node in nodes.NETWORKS[network]().nodes:
        expected[node.channels, node.height, node.width] += node.count * node.norms
    assert normalised == expected


def test_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_passes, "COUNTED_ELEMENTS", 512)
    monkeypatch.setenv("COLUMNS", "150")
    path = tmp_path / "traffic.json"
    arguments = ["--short", "--network", "resnet18", "--layout", "channels_last", "--json", str(path)]
    assert traffic.run(commands.parser("").parse_args(["traffic", *arguments])) == 0
    assert "norm+add" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert [node["form"] for node in written["nodes"]] == [*nodes.FORMS, *nodes.FORMS]
    assert written["totals"] == []
