"""Norms of other libraries whose statistics and parameters are fixed, as batch norms in evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backend import FLOATS
from .kernels.call import Norm

_NAME = "FrozenBatchNorm2d"
# Where a class of that name is: whether its result has the promoted dtype of input and buffers, or that of the input.
_PROMOTES = {"torchvision.ops.misc": True, "detectron2.layers.batch_norm": False}


class Frozen(NamedTuple):
    """x * scale + (bias - running_mean * scale), with scale = weight * (running_var + eps).rsqrt(), by channel.

    ``promotes``: whether the result has the promoted dtype of input and vectors, or that of the input.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    promotes: bool

    def dtype(self, input: Tensor) -> torch.dtype:
        """Of the result."""
        return torch.promote_types(input.dtype, self.weight.dtype) if self.promotes else input.dtype

    def fits(self, input: Tensor) -> bool:
        """Whether it is a batch norm of the input: other shapes are broadcast to something else."""
        vectors = self[:4]
        return (
            input.dim() == 4
            and input.dtype in FLOATS
            and all(v.shape == input.shape[1:2] and v.device == input.device for v in vectors)
            and len({v.dtype for v in vectors}) == 1
            and not (self.running_mean.requires_grad or self.running_var.requires_grad)
        )

    def norm(self, dtype: torch.dtype) -> Norm:
        """The batch norm that gives it, of an input in the result's dtype; sums are in float32 or wider."""
        allowed = (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)
        mean, var, weight, bias = (v if v.dtype in allowed else v.to(allowed[-1]) for v in self[:4])
        return Norm(weight, bias, mean, var, 0.0, self.eps)


def is_frozen_norm(module: object) -> bool:
    """Whether its forward is that of torchvision's (timm's too) or detectron2's ``FrozenBatchNorm2d``."""
    if isinstance(module, _BatchNorm) or not isinstance(module, nn.Module):
        return False
    kind: Any = type(module)
    # A scripted module has none to be asked for. Under torch.compile a function's qualified name is another.
    forward = getattr(kind, "forward", None)
    return getattr(forward, "__module__", None) in _PROMOTES and any(
        each.__name__ == _NAME and each.forward is forward for each in kind.__mro__
    )


def frozen(module: nn.Module) -> Frozen:
    """What such a module computes."""
    m: Any = module
    return Frozen(m.running_mean, m.running_var, m.weight, m.bias, m.eps, _PROMOTES[type(m).forward.__module__])
