"""``fuse_`` on networks as their libraries write them: what it finds in each, and that no number changes."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from count import coverage
from oracle import assert_close
from resfused.kernels.activation import IDENTITY, Activation
from workloads import zoo

import resfused
from resfused.operator import dispatch

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-7
ALONE = "norm"
RELU, ADD, ADD_NORM = "norm+relu", "norm+add+relu", "norm+add(norm)+relu"

# Norms; places of each form with a ReLU; pairs handed on; norms alone. Of B blocks the last one's output goes to the
# pooling, the other B - 1 hand theirs on; where no pooling lies between, the stem does too.
STRUCTURE = {
    # Stem and first norm of 8 blocks; three stages begin with a projection.
    "torchvision/resnet18": (20, 9, 5, 3, 7, 0),
    "torchvision/resnet34": (36, 17, 13, 3, 15, 0),
    # Stem and two norms in each of 16 blocks; all four stages begin with a projection.
    "torchvision/resnet50": (53, 33, 12, 4, 15, 0),
    "torchvision/resnet101": (104, 67, 29, 4, 32, 0),
    "torchvision/resnet152": (155, 101, 46, 4, 49, 0),
    "torchvision/resnext50_32x4d": (53, 33, 12, 4, 15, 0),
    "torchvision/wide_resnet50_2": (53, 33, 12, 4, 15, 0),
    # 1 + 2 + 7 + 12 and 1 + 3 + 6 + 6 blocks, no pooling behind the stem; attention lies inside the branch.
    "torchvision/regnet_x_400mf": (71, 45, 18, 4, 22, 0),
    "torchvision/regnet_y_400mf": (53, 33, 12, 4, 16, 0),
    "timm/resnet18": (20, 9, 5, 3, 7, 0),
    "timm/resnet50": (53, 33, 12, 4, 15, 0),
    # Three norms in the stem.
    "timm/resnet50d": (55, 35, 12, 4, 15, 0),
    "timm/resnet101": (104, 67, 29, 4, 32, 0),
    "timm/resnext50_32x4d": (53, 33, 12, 4, 15, 0),
    # Attention between the last norm and the addition leaves 16 alone; the projection's norm is added to what it gives.
    "timm/seresnet50": (53, 33, 4, 0, 4, 16),
    "timm/ecaresnet50d": (55, 35, 4, 0, 4, 16),
    # Pre-activation: three norms in each of 16 blocks and one behind them, none before an addition.
    "timm/resnetv2_50": (49, 49, 0, 0, 0, 0),
    "transformers/resnet18": (20, 9, 5, 3, 7, 0),
    "transformers/resnet50": (53, 33, 12, 4, 15, 0),
    # 3n blocks, no pooling behind the stem; two stages begin with a projection.
    "cifar/resnet20": (21, 10, 7, 2, 9, 0),
    "cifar/resnet56": (57, 28, 25, 2, 27, 0),
    "small/torchvision_basic": (8, 4, 2, 1, 2, 0),
    "small/torchvision_bottleneck": (12, 7, 1, 2, 2, 0),
    "small/timm_attention": (15, 6, 4, 0, 3, 5),
    "small/transformers_basic": (10, 5, 3, 1, 3, 0),
    "small/cifar_resnet8": (9, 4, 1, 2, 3, 0),
}
DEEP = ("torchvision/resnet101", "torchvision/resnet152", "timm/resnet101", "torchvision/wide_resnet50_2")


def build(name):
    try:
        return zoo.build(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name}: {error}")


def counts(name):
    """The places of each form."""
    _, *with_relu, _, alone = STRUCTURE[name]
    return +Counter(dict(zip((RELU, ADD, ADD_NORM, ALONE), (*with_relu, alone), strict=True)))


def form_of(residual, residual_norm, activation):
    form = ALONE if residual is None else "norm+add(norm)" if residual_norm else "norm+add"
    return form if activation == IDENTITY else f"{form}+{activation.name}"


@pytest.fixture
def plain_calls(monkeypatch):
    """The form of every fused call on plain operators, and whether it took the batch's statistics."""
    made = []
    plain = dispatch._plain

    def recorded(input, residual, norm, residual_norm, activation, training):
        made.append((form_of(residual, residual_norm, activation), training))
        return plain(input, residual, norm, residual_norm, activation, training)

    monkeypatch.setattr(dispatch, "_plain", recorded)
    return made


@pytest.fixture
def nodes(monkeypatch):
    """The form of every autograd node of the kernels, and of those whose output had two gradients."""
    made, forked = [], []
    kernels = dispatch.FusedResidualBlock

    class Recorded(kernels):
        @staticmethod
        def forward(ctx, input, residual, *rest):
            ctx.form = form_of(residual, rest[5].norm_residual, Activation(*rest[7]))
            made.append(ctx.form)
            return kernels.forward(ctx, input, residual, *rest)

        @staticmethod
        def backward(ctx, *gradients):
            if len(gradients) == 2 and None not in gradients:
                forked.append(ctx.form)
            return kernels.backward(ctx, *gradients)

    monkeypatch.setattr(dispatch, "FusedResidualBlock", Recorded)
    return made, forked


def test_every_network_has_its_numbers():
    assert STRUCTURE.keys() == zoo.NETWORKS.keys() | zoo.SMALL.keys()


@pytest.mark.parametrize("name", STRUCTURE)
def test_what_is_found(name):
    network = build(name)
    norms, *_, pairs, _ = STRUCTURE[name]
    keys = list(network.state_dict())
    report = resfused.fuse_(network)
    assert len(report.norms) == norms
    assert not report.left
    assert Counter(entry.form for entry in report.fused) == counts(name)
    assert sum(entry.forked for entry in report.fused) == pairs
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_names_of_resnet50(library):
    """Every place by its norms; of a projection, the branch's first or the shortcut's."""
    expected = {frozenset({"bn1"}): False}
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for i in range(depth):
            block = f"layer{stage}.{i}"
            expected |= {frozenset({f"{block}.bn1"}): False, frozenset({f"{block}.bn2"}): False}
            shortcut = {f"{block}.downsample.1"} if i == 0 else set()
            expected[frozenset({f"{block}.bn3"} | shortcut)] = block != "layer4.2"
    report = resfused.fuse_(build(f"{library}/resnet50"))
    assert {frozenset(entry.norms): entry.forked for entry in report.fused} == expected


@pytest.mark.parametrize("name", [name for name in STRUCTURE if name not in DEEP])
def test_results_on_plain_operators(name, device, plain_calls):
    network = build(name).to(device, torch.float64)
    x = torch.randn(zoo.entry(name).shape, dtype=torch.float64, device=device)
    exact = coverage.results(copy.deepcopy(network), x)
    resfused.fuse_(network)
    with resfused.use_backend("torch"):
        ours = coverage.results(network, x)
    for mode in (True, False):
        assert Counter(form for form, training in plain_calls if training is mode) == counts(name)
    assert_close(ours, exact, TOLERANCE)


# The interpreter takes the smaller ones.
ON_KERNELS = [
    *((name, "native") for name in zoo.SMALL),
    *((f"small/{name}", "triton") for name in ("torchvision_basic", "transformers_basic", "cifar_resnet8")),
]


@pytest.mark.parametrize(("name", "backend"), ON_KERNELS)
def test_results_on_the_kernels(name, backend, device, nodes):
    if backend == "native":
        device = torch.device("cpu")
    made, forked = nodes
    network = build(name).to(device, torch.float64)
    x = torch.randn(zoo.entry(name).shape, dtype=torch.float64, device=device)
    exact = coverage.results(copy.deepcopy(network), x)
    resfused.fuse_(network)
    unfused = copy.deepcopy(network)
    with resfused.use_backend(backend):
        assert_close(coverage.results(network, x), exact, TOLERANCE)
        assert Counter(made) == counts(name)
        assert len(forked) == STRUCTURE[name][4]
        made.clear()
        resfused.unfuse_(unfused)
        # On a GPU PyTorch's own gradients differ from run to run.
        assert_close(coverage.results(unfused, x), exact, 0.0 if device.type == "cpu" else TOLERANCE)
    assert not made


def coverage_command(*arguments):
    import run

    return run.main(["coverage", *arguments])


def test_the_command(tmp_path):
    path = tmp_path / "coverage.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "coverage", "--json", str(path)]
    command += ["--network", "small/cifar_resnet8"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "small/cifar_resnet8" in result.stdout
    assert "WRONG" not in result.stdout
    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["backend"] == "native"
    (network,) = content["networks"]
    assert (network["norms"], network["fused_norms"], network["pairs"]) == (9, 9, 3)
    assert network["ran"] == [9, 9]
    assert network["idle"] == [0, 0]
    assert 0 < network["milliseconds"] < 1e3
    assert network["places"] == {RELU: 4, ADD: 1, ADD_NORM: 2}
    assert network["left"] == {}
    assert 0 < network["errors"]["gradient"] < 1e-12


@pytest.mark.parametrize("fault", ["bias", "running_mean"])
def test_the_command_fails_where_a_number_changes(fault, capsys, monkeypatch):
    fuse_ = resfused.fuse_

    def wrong(network):
        getattr(network[1], fault).data += 1e-5
        return fuse_(network)

    arguments = ("--network", "cifar/resnet20", "--network", "small/cifar_resnet8")
    assert coverage_command(*arguments[2:]) == 0
    monkeypatch.setattr(resfused, "fuse_", wrong)
    assert coverage_command(*arguments) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_command_without_a_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert coverage_command("--network", "timm/resnet18", "--network", "small/cifar_resnet8") == 0
    assert "timm/resnet18 is left out" in capsys.readouterr().out
    assert coverage_command("--network", "timm/resnet18") == 1


def test_norms_alone_are_not_counted_on_plain_operators():
    found = coverage.cover("small/timm_attention", torch.device("cpu"), "torch")
    assert found.left == {}
    # Of 15, the five before attention are nothing but PyTorch's own operator here.
    assert found.ran == (10, 10)
    assert found.idle == (0, 0)
