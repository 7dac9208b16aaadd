"""Residual blocks, each the plain PyTorch block of the same name in ``resfused.reference`` with fused tails.

Arguments, attribute names and state_dict keys are the reference's; a block is replaced by changing its import.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from . import reference
from .norms import tail

_Shortcut = tuple[nn.Conv2d, nn.BatchNorm2d]


class ResidualBlock(reference.ResidualBlock):
    """``ResidualBlock(channels)``: relu(bn2(conv2(relu(bn1(conv1(x))))) + x); (N, channels, H, W) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        out = tail(self.bn1, self.conv1(x))
        return tail(self.bn2, self.conv2(out), x)


class ProjectionResidualBlock(reference.ProjectionResidualBlock):
    """``ProjectionResidualBlock(in_channels, out_channels, stride=2)``: the shortcut is a 1x1 convolution and a norm.

    (N, in_channels, H, W) in; (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = tail(self.bn1, self.conv1(x))
        projection, norm = cast(_Shortcut, self.shortcut)
        return tail(self.bn2, self.conv2(out), projection(x), norm)


class BottleneckResidualBlock(reference.BottleneckResidualBlock):
    """``BottleneckResidualBlock(in_channels, out_channels, stride=1, bottleneck_channels=None)``: 1x1, 3x3, 1x1.

    Identity shortcut where the shape stays, projection where it changes. (N, in_channels, H, W) in;
    (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = tail(self.bn1, self.conv1(x))
        out = tail(self.bn2, self.conv2(out))
        if self.shortcut is None:
            return tail(self.bn3, self.conv3(out), x)
        projection, norm = cast(_Shortcut, self.shortcut)
        return tail(self.bn3, self.conv3(out), projection(x), norm)


class LinearResidualBlock(reference.LinearResidualBlock):
    """``LinearResidualBlock(in_features, out_features=None, hidden_features=None)``: two linear layers.

    (N, in_features) in, (N, out_features) out; a linear projection for shortcut where the features change.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = tail(self.bn1, self.fc1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return tail(self.bn2, self.fc2(out), shortcut)
