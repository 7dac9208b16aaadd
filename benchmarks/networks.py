"""The small residual networks of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", section 4.2."""

from __future__ import annotations

from torch import nn

from resfused.reference import ProjectionResidualBlock, ResidualBlock

WIDTHS = (16, 32, 64)


def cifar_resnet(depth: int = 20, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """A stem of 16 channels, three stages of n basic blocks, and a linear classifier: 6n + 2 layers, in plain PyTorch.

    (N, in_channels, H, W) in, (N, num_classes) out. Shortcuts are identities where the shape stays and projections
    where it changes, the paper's option B; its own networks for CIFAR-10 pad with zeros there, option A.

    Raises: ValueError where depth is not 6n + 2 with n >= 1.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), but got {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
    ]  # fmt: skip
    channels = WIDTHS[0]
    for width in WIDTHS:
        for _ in range(blocks):
            layers.append(ResidualBlock(width) if width == channels else ProjectionResidualBlock(channels, width))
            channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
