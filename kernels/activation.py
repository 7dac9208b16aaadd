"""The activations that a node can end in, and what their gradients are made of.

Values and gradients are those of ``torch.nn.functional``, at the kinks, for NaN and for infinities too.
"""

from __future__ import annotations

from typing import NamedTuple


class Activation(NamedTuple):
    """An activation by its name in ``torch.nn.functional``; ``gelu_tanh`` is gelu with ``approximate="tanh"``.

    ``negative_slope`` is that of ``leaky_relu``, and 0 elsewhere.
    """

    name: str
    negative_slope: float = 0.0

    @property
    def slopes(self) -> tuple[float, float] | None:
        """The two values of the derivative, where a bit of z and where no bit is set; None where it has more."""
        if self.name == "leaky_relu":
            return 1.0, self.negative_slope
        return _SLOPES.get(self.name)


def activation_of(activation: object, negative_slope: object = 0.01, approximate: object = "none") -> Activation:
    """The activation of a name in ``ACTIVATIONS``; the others are ``leaky_relu``'s and ``gelu``'s own arguments.

    An ``Activation`` is given back. Errors: TypeError for a name or a slope of another type, ValueError for an unknown
    name or approximation.
    """
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str or an Activation, but got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but got {activation!r}")
    if type(negative_slope) not in (int, float):
        raise TypeError(f"negative_slope must be a number, but got {type(negative_slope).__name__}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', but got {approximate!r}")
    if activation == "gelu" and approximate == "tanh":
        return Activation("gelu_tanh")
    return Activation(activation, float(negative_slope) if activation == "leaky_relu" else 0.0)  # type: ignore[arg-type]


# Where the bit is set: relu ~(z <= 0), relu6 ~(z <= 0 | z >= 6), leaky_relu z > 0, hardsigmoid -3 < z < 3.
_SLOPES = {"identity": (1.0, 1.0), "relu": (1.0, 0.0), "relu6": (1.0, 0.0), "hardsigmoid": (1 / 6, 0.0)}
_SMOOTH = ("silu", "hardswish", "gelu", "gelu_tanh", "sigmoid")

ACTIVATIONS: tuple[str, ...] = (*_SLOPES, "leaky_relu", *_SMOOTH)
IDENTITY = Activation("identity")
RELU = Activation("relu")
