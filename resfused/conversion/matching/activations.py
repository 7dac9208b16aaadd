"""Which functions, methods and modules are which activation: equal in value and gradient, at the kinks too.

``clamp(0, 6)`` is none: before PyTorch 2.14 it passes the gradient at 0 and 6, where a ReLU6 does not. For the same
reason timm's ``HardSigmoid`` in place, and the hard ones of its ``activations_me``, are none. Where z is NaN the
gradients of timm's ``HardSwish`` and ``HardSigmoid`` are others than PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...kernels.activation import Activation

Meaning = Callable[..., Activation | None]
"""Of the arguments of a call, the first of them z, given by position."""

SIGMOID, SILU = Activation("sigmoid"), Activation("silu")


def _always(name: str) -> Meaning:
    activation = Activation(name)
    return lambda z, inplace=False: activation


def _hardtanh(z: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Activation | None:
    return Activation("relu6") if (min_val, max_val) == (0, 6) else None


def _leaky_relu(z: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Activation | None:
    return Activation("leaky_relu", float(negative_slope)) if isinstance(negative_slope, (int, float)) else None


def _gelu(z: Any, approximate: Any = "none") -> Activation | None:
    return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(approximate)


def _unless_in_place(name: str) -> Meaning:
    return lambda z, inplace=False: None if inplace else Activation(name)


_FUNCTIONS: dict[Any, Meaning] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), _always("relu")),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, torch.special.expit), _always("sigmoid")),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    F.relu6: _always("relu6"),
    F.silu: _always("silu"),
    F.hardswish: _always("hardswish"),
    F.hardsigmoid: _always("hardsigmoid"),
    F.gelu: _gelu,
}
_METHODS: dict[Any, Meaning] = {
    **dict.fromkeys(("relu", "relu_"), _always("relu")),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _always("sigmoid")),
}


class _Class(NamedTuple):
    """What its forward computes, as a function of z and of attributes by their names."""

    meaning: Meaning
    attributes: tuple[str, ...] = ()


_CLASSES: dict[Any, _Class] = {
    nn.ReLU.forward: _Class(_always("relu")),
    nn.Hardtanh.forward: _Class(_hardtanh, ("min_val", "max_val")),
    nn.LeakyReLU.forward: _Class(_leaky_relu, ("negative_slope",)),
    nn.SiLU.forward: _Class(_always("silu")),
    nn.Hardswish.forward: _Class(_always("hardswish")),
    nn.GELU.forward: _Class(_gelu, ("approximate",)),
    nn.Sigmoid.forward: _Class(_always("sigmoid")),
    nn.Hardsigmoid.forward: _Class(_always("hardsigmoid")),
}
"""By their forward, which subclasses have too: of ``Hardtanh`` that is ``ReLU6``."""

_CLASSES_BY_NAME = {
    "timm.layers.activations.HardSwish": _Class(_always("hardswish")),
    "timm.layers.activations.HardSigmoid": _Class(_unless_in_place("hardsigmoid"), ("inplace",)),
    "timm.layers.activations_me.SwishMe": _Class(_always("silu")),
}
"""Of libraries: those whose code does not call one of the functions."""


def called(node: fx.Node) -> Activation | None:
    """The activation that a function or method is, of the node's first argument."""
    tables = {"call_function": _FUNCTIONS, "call_method": _METHODS}
    meaning = tables[node.op].get(node.target) if node.op in tables else None
    if meaning is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    try:
        return meaning(*node.args, **node.kwargs)
    except TypeError:
        return None


def computed(module: object) -> Activation | None:
    """The activation that a module is."""
    known = _known(module)
    return None if known is None else known.meaning(None, **attributes(module))


def attributes(module: object) -> dict[str, Any]:
    """The values that make a module the activation that it is, by name."""
    known = _known(module)
    return {} if known is None else {name: getattr(module, name) for name in known.attributes}


def _known(module: object) -> _Class | None:
    kind: Any = type(module)
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return None
    return _CLASSES.get(kind.forward) or _CLASSES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
