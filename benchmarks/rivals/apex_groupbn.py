"""NVIDIA apex's groupbn: NHWC BatchNorm with ReLU, or addition and ReLU, in CUDA (``apex.contrib.groupbn``).

It takes float16 tensors of shape (N, H, W, C), contiguous: a channels_last tensor permuted, without a copy. apex must
have been built with ``--bnp``. One GPU (bn_group=1). The output uses the biased variance, ``running_var`` gets the
unbiased one, all in float32. Without an addition the backward recomputes the ReLU from x and passes a gradient where
not (z <= 0); with one it reads a bit mask that the forward wrote, and passes it where not (z < 0).

A module owns scratch memory, so that one is kept for each number of channels and form. Its two vectors of statistics
lie there too, and a second forward before the backward would overwrite them; every call gives it new ones.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from rivals.library import Call, Library, Unavailable, imported


class ApexGroupBN(Library):
    """apex's BatchNorm2d_NHWC with fuse_relu."""

    name = "apex groupbn"
    # Threads load four channels at once.
    dtypes: ClassVar[dict[torch.dtype, int]] = {torch.float16: 4}
    layout = torch.channels_last
    evaluates = True
    needs_statistics = True

    def __init__(self) -> None:
        module = imported("apex.contrib.groupbn", "apex")
        # Without --bnp the package prints so, and is empty.
        if not hasattr(module, "BatchNorm2d_NHWC"):
            raise Unavailable("apex was built without --bnp: apex.contrib.groupbn has no BatchNorm2d_NHWC")
        super().__init__()
        self.module = cache(lambda channels, add: module.BatchNorm2d_NHWC(channels, fuse_relu=True))

    def run(self, call: Call) -> Tensor:
        x, channels = call.input, call.input.shape[1]
        module = self.module(channels, call.residual is not None)
        module.train(call.training)
        module.momentum, module.eps = call.momentum, call.eps
        module.minibatch_mean, module.minibatch_riv = x.new_empty(2, channels, dtype=torch.float32)
        nhwc = [t.permute(0, 2, 3, 1) for t in call.activations.values()]
        y = torch.func.functional_call(module, call.vectors, tuple(nhwc))
        if y.requires_grad:
            # It reads the gradient by address, whatever its strides.
            y.register_hook(Tensor.contiguous)
        return y.permute(0, 3, 1, 2)
