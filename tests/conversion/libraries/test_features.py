"""Features out of the middle of a network, as timm and torchvision take them: then fused, and of fused networks."""

import copy

import pytest
import torch
from oracle import assert_close
from small_networks import counted, state
from torch import nn
from workloads import zoo

import resfused

SHAPE = (2, 3, 32, 32)


pytestmark = pytest.mark.usefixtures("torchvision", "timm")


def of_timm(**settings):
    """A stem, and stages of one, two, one and one block of two places; 15 norms."""
    from timm import create_model

    return zoo.with_random_norms(create_model("resnet18", layers=(1, 2, 1, 1), channels=(8, 16, 16, 16), **settings))


def of_torchvision():
    """A stem, a stage of one bottleneck and a stage of two; 12 norms."""
    return zoo.build("small/torchvision_bottleneck")


class Intermediates(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.forward_intermediates(x, intermediates_only=True)


def getter(network):
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(network, {"relu": "stem", "layer1": "first", "layer2": "second"})


def extractor(network):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(network, {"layer1": "first", "layer2.0.relu_1": "inside", "layer2": "second"})


def features(model, x):
    found = model(x)
    return list(found.values()) if isinstance(found, dict) else found


def training_step(model, x):
    """With a gradient for every feature."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    found = features(model, leaf)
    gradients = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y) for y in found]
    torch.autograd.backward(found, gradients)
    outputs = {f"output {i}": y.detach() for i, y in enumerate(found)}
    return {**outputs, "gradient of the input": leaf.grad, **state(model)}


def evaluation(model, x):
    with torch.no_grad():
        return dict(enumerate(features(model.eval(), x)))


def assert_alike(fused, eager, expected):
    """``expected``: of a training step the nodes forward, backward, and those of pairs."""
    x = torch.randn(SHAPE, dtype=torch.float64, device=next(eager.parameters()).device)
    for run, nodes in ((training_step, expected), (evaluation, [expected[0], 0, 0])):
        with counted() as ran:
            ours = run(fused, x)
        assert ran == nodes
        assert_close(ours, run(eager, x), 1e-9)


# What gives features; what of it runs fused; the norms that are left.
TAKERS = {
    "features_only": (lambda: of_timm(features_only=True), [11, 11, 1], 0),
    # Hooks are on the stem's ReLU, before which its norm runs alone, and on the stages, which hand on no pairs then.
    "features_only, hooks": (lambda: of_timm(features_only=True, feature_cls="hook"), [11, 11, 1], 0),
    "features_only, torch.fx": (lambda: of_timm(features_only=True, feature_cls="fx"), [0, 0, 0], 15),
    # Its code calls the parts of the stem, one after the other.
    "forward_intermediates": (lambda: Intermediates(of_timm()), [10, 10, 1], 0),
    "IntermediateLayerGetter": (lambda: getter(of_torchvision()), [10, 10, 1], 0),
    "create_feature_extractor": (lambda: extractor(of_torchvision()), [0, 0, 0], 12),
}


@pytest.mark.parametrize("name", TAKERS)
def test_fused_afterwards(name, device):
    make, expected, left = TAKERS[name]
    eager = make().to(device, torch.float64).train()
    fused = copy.deepcopy(eager)
    assert len(resfused.fuse_(fused).left) == left
    assert_alike(fused, eager, expected)


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        # The stem's parts are called one by one.
        (getter, [9, 9, 1]),
        (extractor, [0, 0, 0]),
    ],
)
def test_of_a_fused_network(take, expected, device):
    """A graph has PyTorch's own operators, the same ones as of the unfused network; the network stays fused."""
    eager = of_torchvision().to(device, torch.float64)
    fused = copy.deepcopy(eager)
    assert not resfused.fuse_(fused).left
    assert_alike(take(fused), take(eager), expected)
    with torch.no_grad(), counted() as ran:
        fused(torch.randn(SHAPE, dtype=torch.float64, device=device))
    assert ran == [10, 0, 0]


def test_names_of_a_fused_networks_nodes():
    network = of_torchvision()
    from torchvision.models.feature_extraction import get_graph_node_names

    names = get_graph_node_names(network)
    resfused.fuse_(network)
    assert get_graph_node_names(network) == names


def test_why_norms_are_left():
    for name in ("features_only, torch.fx", "create_feature_extractor"):
        assert all("GraphModule" in left.reason for left in resfused.fuse_(TAKERS[name][0]()).left)
