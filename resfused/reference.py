"""Plain PyTorch of everything that the library fuses: the meaning of each function and block, and the fallback.

Deep residual learning: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

``zero_init_residual`` of the blocks is torchvision's: the weight of the branch's last norm starts at zero, so that a
block with an identity shortcut starts as relu(x), and one with a projection as the ReLU of its shortcut; Goyal et al.,
"Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.activation import Activation, activation_of

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


def activate(z: Tensor, activation: Activation) -> Tensor:
    """The function of ``torch.nn.functional`` that the activation names."""
    if activation.name == "leaky_relu":
        return F.leaky_relu(z, activation.negative_slope)
    return _FUNCTIONS[activation.name](z)


def takes_first_slope(z: Tensor, activation: Activation) -> Tensor:
    """Where the derivative is the first of ``activation.slopes``."""
    # NaN is not <= 0: a ReLU passes it, and its gradient.
    if activation.name == "relu":
        return ~(z <= 0)
    if activation.name == "relu6":
        return ~((z <= 0) | (z >= 6))
    return z > 0 if activation.name == "leaky_relu" else (z > -3) & (z < 3)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | Activation = "relu",
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    approximate: str = "none",
) -> Tensor:
    """activation(batch_norm(input) + residual)"""
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(z if residual is None else z + residual, activation_of(activation, negative_slope, approximate))


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input))"""
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input) + residual)"""
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, residual=residual)


def batch_norm_add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
    activation: str | Activation = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
) -> Tensor:
    """activation(batch_norm(input) + batch_norm(residual))"""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shortcut = F.batch_norm(
        residual, residual_running_mean, residual_running_var, residual_weight, residual_bias,
        training, residual_momentum, residual_eps,
    )  # fmt: skip
    return activate(y + shortcut, activation_of(activation, negative_slope, approximate))


def batch_norm_add_batch_norm_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input) + batch_norm(residual))"""
    return batch_norm_add_batch_norm_act(
        input, residual, running_mean, running_var, residual_running_mean, residual_running_var, weight, bias,
        residual_weight, residual_bias, training, momentum, eps, residual_momentum, residual_eps,
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + x), 3x3 convolutions; (N, channels, H, W) in and out."""

    def __init__(self, channels: int, *, zero_init_residual: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class ProjectionResidualBlock(nn.Module):
    """``ResidualBlock`` from in_channels to out_channels, its shortcut a 1x1 convolution and a BatchNorm.

    (N, in_channels, H, W) in; (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2, *, zero_init_residual: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class BottleneckResidualBlock(nn.Module):
    """1x1, 3x3 with the stride, 1x1 convolutions; the shortcut is a projection where the shape changes.

    (N, in_channels, H, W) in; (N, out_channels, ceil(H / stride), ceil(W / stride)) out. ``bottleneck_channels`` is the
    width of the first two convolutions, a quarter of ``out_channels`` by default.
    """

    shortcut: nn.Sequential | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        bottleneck_channels: int | None = None,
        *,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        width = max(out_channels // 4, 1) if bottleneck_channels is None else bottleneck_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = None
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        if zero_init_residual:
            nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class LinearResidualBlock(nn.Module):
    """relu(bn2(fc2(relu(bn1(fc1(x))))) + x); where the features change, a linear projection of x in its place.

    (N, in_features) in, (N, out_features) out; ``hidden_features`` is ``out_features`` by default.
    """

    shortcut: nn.Linear | None

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        hidden_features: int | None = None,
        *,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden_features = out_features if hidden_features is None else hidden_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=False)
        self.bn2 = nn.BatchNorm1d(out_features)
        self.shortcut = None if in_features == out_features else nn.Linear(in_features, out_features, bias=False)
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.fc1(x)))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.bn2(self.fc2(out)) + shortcut)
