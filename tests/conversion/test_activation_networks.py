"""Networks whose norms end in other activations than ReLU, or in none, as their libraries write them."""

import copy
from collections import Counter

import pytest
import torch
from count import coverage
from parts import ADD, ADD_NORM, ALONE, RELU, SUM
from workloads import zoo

import resfused

# Its settings; norms with an activation; blocks, whose last norm has none: it is added where there is a shortcut.
INVERTED = {
    "torchvision/mobilenet_v2": ({"width_mult": 0.25}, {"norm+relu6": 35}, 17),
    "torchvision/mobilenet_v3_small": ({"width_mult": 0.5}, {"norm+hardswish": 18, RELU: 5}, 11),
    "torchvision/efficientnet_b0": ({}, {"norm+silu": 33}, 16),
    "timm/mobilenetv3_small_050": ({}, {"norm+hardswish": 18, RELU: 5}, 11),
    "timm/efficientnet_b0": ({}, {"norm+silu": 33}, 16),
}


def fused(name, device, **settings):
    """The network with its report; no number changes, and all that is reported runs."""
    library, _, model = name.partition("/")
    pytest.importorskip(library)
    make = zoo._torchvision if library == "torchvision" else zoo._timm
    torch.manual_seed(0)
    network = zoo.with_random_norms(make(model, num_classes=10, **settings).make()).to(device, torch.float64)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, device=device)
    exact = coverage.results(copy.deepcopy(network), x)
    report = resfused.fuse_(network)
    assert not report.left
    assert not report.check(network, x).idle
    errors = coverage.differences(coverage.results(network, x), exact)
    assert max(errors.values()) < 1e-7, errors
    return network, report


def places(report, in_training=True):
    return Counter(e.form for e in report.fused if (e.in_training if in_training else e.in_evaluation))


@pytest.mark.parametrize("name", INVERTED)
def test_inverted_residuals(name, device):
    settings, activated, blocks = INVERTED[name]
    network, report = fused(name, device, **settings)
    shortcuts = sum(getattr(m, "use_res_connect", getattr(m, "has_skip", False)) for m in network.modules())
    assert shortcuts > 5
    expected = {**activated, SUM: shortcuts, ALONE: blocks - shortcuts}
    assert places(report, in_training=False) == expected
    if name == "torchvision/efficientnet_b0":
        # Drop path comes between.
        expected = {**activated, ALONE: blocks}
    assert places(report) == expected
    # A block that adds its input takes it as a pair; timm's BatchNormAct2d gives none.
    pairs = sum(entry.forked for entry in report.fused if entry.in_training)
    assert pairs == (shortcuts if name.startswith("torchvision") else 0)


def test_regnet(device):
    _, report = fused("timm/regnety_002", device)
    # The stem and two norms in each of 13 blocks, of which four begin a stage.
    assert places(report) == {RELU: 27, ADD: 9, ADD_NORM: 4}
