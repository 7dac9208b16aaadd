"""Training on real images: the fused network goes through the same losses as the plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resfused
from resfused import reference

STEPS, BATCH = 5, 16


def network():
    """A small ResNet with all three forms of tails: a stem, an identity block, a projection block."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        reference.ResidualBlock(8), reference.ProjectionResidualBlock(8, 16), reference.ResidualBlock(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def losses(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    found = []
    for x, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_five_steps_on_digits(device):
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn ships the images").load_digits()
    images = torch.tensor(digits.images[: STEPS * BATCH] / 16, dtype=torch.float64, device=device)[:, None]
    labels = torch.tensor(digits.target[: STEPS * BATCH], device=device)
    plain = network().to(device, torch.float64)
    fused = copy.deepcopy(plain)
    report = resfused.fuse_(fused)
    assert (len(report.fused), sum(entry.forked for entry in report.fused), len(report.left)) == (7, 3, 0)
    expected = losses(plain, images, labels)
    assert losses(fused, images, labels) == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0]
