"""The passes of one node: of our launches as they are counted, of eager's operators by a model of each.

One *pass* is reading or writing one activation tensor once, in its own dtype. Of each launch the unique bytes are
counted: what a GPU must move if everything that a launch touches twice is found in its caches the second time. What
PyTorch moves between the launches is not counted; in these layouts there is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar

import torch
from resfused.kernels import geometry
from resfused.kernels.activation import RELU, Activation
from resfused.kernels.gpu import launch_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads.nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU
from workloads.problems import LAYOUTS

from count.recorder import Launch, record
from resfused import reference
from resfused.operator.arguments import Norm
from resfused.operator.dispatch import normalise_add_activate

FORWARD, BACKWARD, FORKED, EVAL = PHASES = ("forward", "backward", "backward of a fork", "eval")
SEPARATE, ONE_LAUNCH = WAYS = ("separate launches", "one launch")
# The interpreter needs about a second for a node of this many elements.
COUNTED_ELEMENTS = 2**14
# Autograd adds the two gradients of a forked activation in a kernel of its own: two reads, one write.
FORK_PASSES = 3

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class LaunchTraffic:
    """What one launch reads and writes, in passes: of activations and bit masks, and of everything per channel."""

    kernel: str
    activation_read: float
    activation_written: float
    channel_read: float
    channel_written: float

    @property
    def activation(self) -> float:
        return self.activation_read + self.activation_written

    @property
    def channel(self) -> float:
        return self.channel_read + self.channel_written


def count_node(
    form: str,
    phase: str,
    way: str,
    layout: str,
    dtype: torch.dtype,
    shape: Shape,
    activation: Activation = RELU,
) -> list[LaunchTraffic]:
    """The traffic of every launch of one node on activations of ``shape``; everything requires a gradient.

    The backward of a fork is given two gradients of the output, which it adds. What one launch reads twice counts once,
    as everywhere here: that the second reading finds its slice in the L2 cache is for a GPU to show.

    Bytes are counted at ``reduced(shape)``. An argument's share of bytes read and written there, times its size in the
    launches that the library makes for ``shape`` itself, is its traffic at ``shape``: so partial results, whose number
    follows the real launch's grid, have their real size. Those launches are looked at and not executed.

    An argument is an activation if it has as many elements as one, or is a bit mask (uint8); others are per channel.
    Parameters and running statistics are float32, or float64 for float64.
    """
    counted = _launches(form, activation, phase, way, layout, dtype, reduced(shape, layout), execute=True)
    real = _launches(form, activation, phase, way, layout, dtype, shape, execute=False)
    if [launch.kernel for launch in counted] != [launch.kernel for launch in real]:
        raise RuntimeError(f"the launches of {form} at {shape} are not those at {reduced(shape, layout)}")
    return [_scaled(c, r, prod(shape), dtype.itemsize) for c, r in zip(counted, real, strict=True)]


def _scaled(counted: Launch, real: Launch, numel: int, itemsize: int) -> LaunchTraffic:
    """The passes of the ``real`` launch, over activations of ``numel`` elements, by the shares of the ``counted``."""
    passes = dict.fromkeys(("activation_read", "activation_written", "channel_read", "channel_written"), 0.0)
    for c, r in zip(counted.arguments, real.arguments, strict=True):
        part = "activation" if r.numel == numel or r.dtype is torch.uint8 else "channel"
        size = r.nbytes / (numel * itemsize)
        passes[f"{part}_read"] += c.read / c.nbytes * size
        passes[f"{part}_written"] += c.written / c.nbytes * size
    return LaunchTraffic(real.kernel, **passes)


def reduced(shape: Shape, layout: str) -> Shape:
    """``shape``, or where it has more than ``COUNTED_ELEMENTS`` one that is cut along all but the inner axis.

    The inner axis (channels, or a plane's positions) decides the padding of the bit mask and so keeps its extent.
    """
    _, channels, height, width = shape
    if prod(shape) <= COUNTED_ELEMENTS:
        return shape
    if layout == "channels_last":
        return 1, channels, 1, max(2, COUNTED_ELEMENTS // channels)
    # As few images as leave the kernels the walk that they take through the whole shape.
    images = geometry.COLUMNS_LEAST_IMAGES if geometry.walks_columns(shape[0], height * width) else 1
    return images, min(channels, max(1, COUNTED_ELEMENTS // (images * height * width))), height, width


def _launches(
    form: str,
    activation: Activation,
    phase: str,
    way: str,
    layout: str,
    dtype: torch.dtype,
    shape: Shape,
    execute: bool,
) -> list[Launch]:
    # A forward is the same whatever follows: a tail's comes with the backward of the fork that it mostly feeds.
    forked = phase == FORKED or (phase == FORWARD and form != NORM_RELU)
    forward, backward = _run_node(form, activation, phase != EVAL, forked, way, layout, dtype, shape, execute)
    return backward if phase in (BACKWARD, FORKED) else forward


@cache
def _run_node(
    form: str,
    activation: Activation,
    training: bool,
    forked: bool,
    way: str,
    layout: str,
    dtype: torch.dtype,
    shape: Shape,
    execute: bool,
) -> tuple[list[Launch], list[Launch]]:
    """The launches of a node's forward and, with ``training``, of its backward."""
    nodes = launch_table.EVERY_NODE if way == ONE_LAUNCH else launch_table.NO_NODE
    with launch_table.using(ONE_LAUNCH_ELEMENTS=nodes), record(execute) as launches:
        outputs, inputs = _forward_pair(form, activation, training, _activations(layout, dtype, shape, execute, 2))
        forward = launches.copy()
        launches.clear()
        if training:
            used = outputs if forked else outputs[:1]
            torch.autograd.grad(used, inputs, _activations(layout, dtype, shape, execute, len(used)))
    return forward, launches


def _activations(layout: str, dtype: torch.dtype, shape: Shape, filled: bool, count: int) -> list[Tensor]:
    """Random where ``filled``; else of memory that is never touched, however large it is."""
    tensors = [torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(count)]
    return [t.normal_() if filled else t for t in tensors]


def _forward(
    library: Any, form: str, activation: Activation, training: bool, activations: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """A node's output and what it may be differentiated by; ``library`` has the functions of ``resfused.reference``."""
    x, residual = activations
    running, parameters = _vectors(activations, training)
    if form == NORM_ADD_NORM_RELU:
        y = library.batch_norm_add_batch_norm_act(x, residual, *running, *parameters, training, activation=activation)
        return y, [x, residual, *parameters]
    added = residual if form == NORM_ADD_RELU else None
    y = library.batch_norm_act(x, *running[:2], *parameters[:2], training, activation=activation, residual=added)
    return y, [x, *([] if added is None else [added]), *parameters[:2]]


def _forward_pair(
    form: str, activation: Activation, training: bool, activations: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """As ``_forward`` of the fused functions, with the output as the pair that feeds a fork."""
    x, residual = activations
    running, parameters = _vectors(activations, training)
    weight, bias, *others = parameters
    norm = Norm(weight, bias, running[0], running[1], 0.1, 1e-5)
    other = Norm(others[0], others[1], running[2], running[3], 0.1, 1e-5) if form == NORM_ADD_NORM_RELU else None
    added = None if form == NORM_RELU else residual
    pair = normalise_add_activate(x, added, norm, other, activation, training, forked=True)
    return pair, [x, *([] if added is None else [added]), *parameters[: 2 if other is None else 4]]


def kept_by(forward: Callable[[], Tensor]) -> float:
    """What a forward keeps of full size, in activations, but for its output: what follows keeps that."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    saved.pop(y.data_ptr(), None)
    # A bit mask is the least of that size.
    return sum(tensor.nbytes for tensor in saved.values() if tensor.numel() >= y.numel() // 8) / y.nbytes


def kept(library: Any, form: str, activation: Activation) -> float:
    """By a node's training forward, see ``kept_by``."""
    activations = _activations("channels_last", torch.float32, (2, 8, 16, 16), True, 2)
    return kept_by(lambda: _forward(library, form, activation, True, activations)[0])


def _vectors(activations: list[Tensor], training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(running statistics, parameters) of two norms; with ``training`` everything requires a gradient."""
    x = activations[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    for activation in activations:
        activation.requires_grad_(training)
    running = [torch.ones(x.shape[1], dtype=dtype) for _ in range(4)]
    return running, [torch.ones(x.shape[1], dtype=dtype, requires_grad=training) for _ in range(4)]


class _EagerTraffic(TorchDispatchMode):
    """Sums the elements of activations that eager operators read and write; see ``eager_passes``."""

    # Where each BatchNorm operator is told that it takes the batch's statistics.
    TRAINING: ClassVar[dict[Any, int]] = {
        torch.ops.aten.native_batch_norm.default: 5,
        torch.ops.aten.native_batch_norm_backward.default: 7,
    }

    def __init__(self, numel: int):
        super().__init__()
        self._numel = numel
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            training = func in self.TRAINING and args[self.TRAINING[func]]
            self.elements += (2 if training else 1) * self._activations(args)
            self.elements += self._activations(result if isinstance(result, tuple) else (result,))
        return result

    def _activations(self, values: Any) -> int:
        return sum(t.numel() for t in values if isinstance(t, Tensor) and t.numel() == self._numel)


@cache
def eager_passes(form: str, phase: str, activation: Activation = RELU) -> float:
    """Passes of eager PyTorch, by a model of each operator and not by looking into its kernel.

    Every operator reads its inputs once and writes its output once, a view is free, and BatchNorm with batch statistics
    reads its inputs twice: for the statistics and for the result. So native_batch_norm 3 passes, 2 in eval mode;
    native_batch_norm_backward 5; add 3; relu 2; threshold_backward 3, as of other activations. Vectors over
    channels do not count.
    """
    if phase == FORKED:
        return eager_passes(form, BACKWARD, activation) + FORK_PASSES
    shape: Shape = (2, 8, 4, 4)
    traffic = _EagerTraffic(prod(shape))
    activations = _activations("contiguous", torch.float32, shape, True, 2)
    if phase == BACKWARD:
        y, inputs = _forward(reference, form, activation, True, activations)
        dy = torch.ones_like(y)
        with traffic:
            torch.autograd.grad(y, inputs, dy)
    else:
        with traffic:
            _forward(reference, form, activation, phase == FORWARD, activations)
    return traffic.elements / prod(shape)
