"""Torchvision's detectors, called as classifiers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FEW = {"num_classes": 5, "min_size": 96, "max_size": 128}
_REGIONS = {
    **_FEW, "rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 64, "box_batch_size_per_image": 32,
    "box_score_thresh": 0.0, "box_detections_per_img": 8,
}  # fmt: skip
_ANCHORS = {**_FEW, "score_thresh": 0.0, "topk_candidates": 64, "detections_per_img": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": _REGIONS,
    "maskrcnn_resnet50_fpn": _REGIONS,
    "retinanet_resnet50_fpn": _ANCHORS,
    "fcos_resnet50_fpn": _ANCHORS,
    # Its images are of 320x320, whatever is asked for.
    "ssdlite320_mobilenet_v3_large": {name: value for name, value in _ANCHORS.items() if "size" not in name},
}
"""Small, and with a score that random weights reach: what is not detected is not compared."""
_CLASSES = {
    "fasterrcnn_resnet50_fpn": "FasterRCNN",
    "maskrcnn_resnet50_fpn": "MaskRCNN",
    "retinanet_resnet50_fpn": "RetinaNet",
}


def with_frozen_norms(library: Any, name: str, features: str = "resnet50") -> nn.Module:
    """Of ``families.FROZEN_DETECTORS`` the one without norms that are trained, of whose network ``features`` the last
    three stages are trained. Images stay as large as they are. ``library``: torchvision.
    """
    name = name.removesuffix("_frozen")
    settings: dict[str, Any] = {"backbone_name": features, "weights": None, "trainable_layers": 3}
    if name.startswith("retinanet"):
        settings |= {
            "returned_layers": [2, 3, 4],
            "extra_blocks": library.ops.feature_pyramid_network.LastLevelP6P7(256, 256),
        }
    models = library.models.detection
    backbone = models.backbone_utils.resnet_fpn_backbone(**settings)
    return getattr(models, _CLASSES[name])(backbone, **SETTINGS[name], _skip_resize=True)


class Detector(nn.Module):
    """``network`` of images (N, 3, H, W), of 96x96 or more, with two objects in each.

    Returns its losses in training, and all that it detects in evaluation, as one vector.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def body(self) -> nn.Module:
        """The network for features, without its pyramid."""
        return self.network.backbone.body  # type: ignore[union-attr,return-value]

    def forward(self, x: Tensor) -> Tensor:
        found = self.network(list(x), [_objects(image) for image in x])
        if self.training:
            return torch.stack(list(found.values()))
        return torch.cat([values.flatten().to(x.dtype) for detected in found for values in detected.values()])


def _objects(image: Tensor) -> dict[str, Tensor]:
    boxes = torch.tensor([[8, 10, 42, 50], [30, 24, 90, 80]], device=image.device)
    masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8, device=image.device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes.to(image.dtype), "labels": torch.tensor([1, 2], device=image.device), "masks": masks}
