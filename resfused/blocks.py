"""Residual blocks, each the plain PyTorch block of the same name in ``resfused.reference`` with fused tails.

Arguments, attribute names and state_dict keys are the reference's; a block is replaced by changing its import. All take
``zero_init_residual=False``, by keyword: torchvision's, the weight of the branch's last norm starts at zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import reference
from .norms import forked_tail, is_watched, tail

_Shortcut = tuple[nn.Conv2d, nn.BatchNorm2d]


class ForkedBlock(nn.Module):
    """A block that can take its input as two tensors, for the branch and for the shortcut, and give its output so.

    ``Sequential`` hands the pair from block to block; called alone, a block takes and gives one tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_forked(x, x, forked=False)[0]

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class ResidualBlock(ForkedBlock, reference.ResidualBlock):
    """``ResidualBlock(channels)``: relu(bn2(conv2(relu(bn1(conv1(x))))) + x); (N, channels, H, W) in and out."""

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        out = tail(self.bn1, self.conv1(x))
        return forked_tail(self.bn2, self.conv2(out), shortcut, forked=forked)


class ProjectionResidualBlock(ForkedBlock, reference.ProjectionResidualBlock):
    """``ProjectionResidualBlock(in_channels, out_channels, stride=2)``: the shortcut is a 1x1 convolution and a norm.

    (N, in_channels, H, W) in; (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        out = tail(self.bn1, self.conv1(x))
        projection, norm = cast(_Shortcut, self.shortcut)
        return forked_tail(self.bn2, self.conv2(out), projection(shortcut), norm, forked=forked)


class BottleneckResidualBlock(ForkedBlock, reference.BottleneckResidualBlock):
    """``BottleneckResidualBlock(in_channels, out_channels, stride=1, bottleneck_channels=None)``: 1x1, 3x3, 1x1.

    Identity shortcut where the shape stays, projection where it changes. (N, in_channels, H, W) in;
    (N, out_channels, ceil(H / stride), ceil(W / stride)) out.
    """

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        out = tail(self.bn1, self.conv1(x))
        out = tail(self.bn2, self.conv2(out))
        if self.shortcut is None:
            return forked_tail(self.bn3, self.conv3(out), shortcut, forked=forked)
        projection, norm = cast(_Shortcut, self.shortcut)
        return forked_tail(self.bn3, self.conv3(out), projection(shortcut), norm, forked=forked)


class LinearResidualBlock(ForkedBlock, reference.LinearResidualBlock):
    """``LinearResidualBlock(in_features, out_features=None, hidden_features=None)``: two linear layers.

    (N, in_features) in, (N, out_features) out; a linear projection for shortcut where the features change.
    """

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool = True) -> tuple[Tensor, Tensor]:
        out = tail(self.bn1, self.fc1(x))
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        return forked_tail(self.bn2, self.fc2(out), shortcut, forked=forked)


class Sequential(nn.Sequential):
    """``torch.nn.Sequential`` that hands the output of one of this package's blocks to the next as a pair.

    The output feeds the next block's branch and its shortcut; as a pair, its two gradients are added inside the
    backward of the block that made it, and not by autograd in a pass of their own. Values, gradients and state_dict are
    those of ``torch.nn.Sequential``. A block with a hook on it or in it, or with a subclass's own ``forward``, is
    called as any module is: what others see has its whole gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        pair = input, input
        for module, following in pairwise([*self, None]):
            if takes_pairs(module):
                pair = cast(ForkedBlock, module).forward_forked(*pair, forked=takes_pairs(following))
            elif module is not None:
                y = module(pair[0])
                pair = y, y
        return pair[0]


def takes_pairs(module: nn.Module | None) -> bool:
    """Whether ``forward_forked`` is what a call of the module does."""
    if not isinstance(module, ForkedBlock) or type(module).forward is not ForkedBlock.forward:
        return False
    # A hook on what takes the block's input, which may lie in the shortcut, would see one half of the pair.
    return not _has_any_global_hook() and not any(map(is_watched, module.modules()))
