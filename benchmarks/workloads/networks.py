"""The small networks of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", section 4.2."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from resfused import reference

WIDTHS = (16, 32, 64)

Block = Callable[[int, int], nn.Module]


class PlainBlock(nn.Module):
    """``ProjectionResidualBlock`` without its shortcut: relu(bn2(conv2(relu(bn1(conv1(x)))))).

    (N, in_channels, H, W) in; (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)))


def cifar_resnet(
    depth: int = 20,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    widths: tuple[int, ...] = WIDTHS,
    blocks: ModuleType = reference,
    zero_init_residual: bool = False,
) -> nn.Sequential:
    """A stem, three stages of n basic blocks of ``widths`` channels, and a linear classifier: 6n + 2 layers.

    (N, in_channels, H, W) in, (N, num_classes) out. Shortcuts are identities where the shape stays and projections
    where it changes, the paper's option B; its own networks for CIFAR-10 pad with zeros there, option A. The blocks are
    those of ``blocks``: ``resfused.reference``, plain PyTorch, or ``resfused``.

    Raises: ValueError where depth is not 6n + 2 with n >= 1.
    """

    def block(channels: int, width: int) -> nn.Module:
        if channels == width:
            return blocks.ResidualBlock(width, zero_init_residual=zero_init_residual)
        return blocks.ProjectionResidualBlock(channels, width, zero_init_residual=zero_init_residual)

    return _network(depth, num_classes, in_channels, widths, block)


def cifar_plain(
    depth: int = 20, num_classes: int = 10, in_channels: int = 3, *, widths: tuple[int, ...] = WIDTHS
) -> nn.Sequential:
    """``cifar_resnet`` without its shortcuts: the same layers one after the other, in plain PyTorch."""
    return _network(depth, num_classes, in_channels, widths, lambda c, w: PlainBlock(c, w, 1 if c == w else 2))


def _network(depth: int, num_classes: int, in_channels: int, widths: tuple[int, ...], block: Block) -> nn.Sequential:
    """``block(channels in, channels out)``: halves the images where the two differ."""
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), but got {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    ]  # fmt: skip
    channels = widths[0]
    for width in widths:
        for _ in range(blocks):
            layers.append(block(channels, width))
            channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
