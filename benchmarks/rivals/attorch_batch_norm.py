"""attorch: BatchNorm with addition and activation in Triton, one program a channel (github.com/BobMcDear/attorch).

Called as its layers call it, with our tensors for their parameters and buffers. The forward keeps the pre-activation, a
whole tensor, for a backward of two kernels: the ReLU's, whose result is the residual's gradient, then the norm's.
Statistics are float32, merged block by block; the output uses the biased variance, ``running_var`` gets the unbiased
one. A gradient passes where not (z <= 0), of z rounded to the activations' dtype.

Contiguous tensors only: the ReLU's backward reads the pre-activation in memory order beside a gradient flattened in
logical order, which for channels_last are two orders. Frozen statistics have no gradients: it saves none then.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rivals.library import Call, Library, imported


class Attorch(Library):
    """attorch's BatchNorm2d with act_func="relu", and pre_act_add for the residual."""

    name = "attorch"
    dtypes: ClassVar[dict[torch.dtype, int]] = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 1}
    layout = torch.contiguous_format
    evaluates = True

    def __init__(self) -> None:
        self.function = imported("attorch.batch_norm_layer", "attorch").BatchNormAutoGrad
        super().__init__()

    def run(self, call: Call) -> Tensor:
        track_running_stats = call.running_mean is not None
        return self.function.apply(
            call.input, call.training, call.weight, call.bias, call.running_mean, call.running_var,
            call.momentum, call.eps, track_running_stats, call.residual, "relu",
        )  # fmt: skip
