"""A detector of torchvision, whose network for features is fused: lists of images in, losses or detections out."""

import copy

import pytest
import torch
from count import coverage
from oracle import assert_close
from small_networks import counted
from torch import nn
from workloads import detection, zoo

import resfused

# ResNet-18's stem and two places in each of 8 blocks; the ends of stages go to the pyramid, too.
PLACES, PAIRS = 17, 4
SHAPE = (2, 3, 96, 96)


@pytest.fixture
def library(torchvision):
    if not torchvision.extension._has_ops():
        pytest.skip("torchvision's own operators are not there beside this torch")
    return torchvision


@pytest.fixture
def network(library, device):
    from torchvision.models.detection import FasterRCNN, backbone_utils

    backbone = backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    settings = detection.SETTINGS["fasterrcnn_resnet50_fpn"]
    return zoo.with_random_norms(FasterRCNN(backbone, **settings)).to(device, torch.float64)


def test_a_detector(network, device):
    x = torch.randn(SHAPE, dtype=torch.float64, device=device)
    fused = copy.deepcopy(network)
    report = resfused.fuse_(fused)
    assert len(report.norms) == 20
    with counted() as ran:
        ours = coverage.results(detection.Detector(fused), x)
    assert ran == [2 * PLACES, PLACES, PAIRS]
    exact = coverage.results(detection.Detector(network), x)
    # Eight detections in each image, of four coordinates, a label and a score.
    assert exact["output in evaluation"].shape == (2 * 8 * 6,)
    assert_close(ours, exact, 1e-9)
    objects = [{"boxes": x.new_tensor([[8, 10, 42, 50]]), "labels": torch.tensor([1], device=device)}] * 2
    assert report.check(fused, list(x), objects).places == (PLACES, PLACES)


def test_frozen_norms(library, device):
    """A detector as it is fine-tuned: a step and an evaluation; all of its norms run, and few of its layers train."""
    network = zoo.with_random_norms(detection.with_frozen_norms(library, "retinanet_resnet50_fpn", "resnet18"))
    network.to(device, torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64, device=device)
    fused = copy.deepcopy(network)
    report = resfused.fuse_(fused)
    assert (len(report.norms), report.left) == (20, ())
    assert all(entry.frozen for entry in report.fused)
    with counted() as ran:
        ours = coverage.results(detection.Detector(fused), x)
    # Of a RetinaNet's pyramid the first stage is no part: its end is a pair.
    assert ran == [2 * PLACES, PLACES, PAIRS + 1]
    exact = coverage.results(detection.Detector(network), x)
    assert {"gradient of network.backbone.body.layer2.0.conv1.weight", "gradient of input"} <= exact.keys()
    assert "gradient of network.backbone.body.layer1.0.conv1.weight" not in exact
    assert_close(ours, exact, 1e-9)


def test_detectors_are_not_built_without_torchvisions_operators(torchvision, monkeypatch):
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="torchvision's own operators, such as nms, are not there"):
        zoo.build("torchvision/fcos_resnet50_fpn")
