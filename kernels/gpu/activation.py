"""Device functions of the activations: values, gradients, and the bits that a derivative of two values is kept as.

Formulas and results, at the kinks, for NaN and for infinities too, are those of PyTorch on a GPU
(aten/src/ATen/native/cuda/Activation*Kernel.cu); on a CPU its gradients of relu6 and hardswish at NaN depend on where
the element stands. ``activation`` is an ``Activation``, known to the compiler.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
# The density of the normal distribution at 0, 1 / sqrt(2·pi).
_DENSITY = tl.constexpr(0.3989422804014327)
# gelu_tanh is z·sigmoid(z·(A + B·z²)): tanh(u) = 2·sigmoid(2·u) - 1, with A = 2·sqrt(2/pi), B = 0.044715·A.
_A = tl.constexpr(1.5957691216057308)
_B = tl.constexpr(0.07135481627260025)


@triton.jit
def activate(z, activation: tl.constexpr):
    """The activation of ``z``."""
    if activation.name == "identity":
        return z
    elif activation.name == "relu":
        # NaN is not <= 0: it stays.
        return tl.where(z <= 0, 0, z)
    elif activation.name == "relu6":
        return tl.where(z <= 0, 0, tl.where(z >= 6, 6, z))
    elif activation.name == "leaky_relu":
        return tl.where(z > 0, z, z * activation.negative_slope)
    elif activation.name == "hardsigmoid":
        return _hardsigmoid(z)
    elif activation.name == "silu":
        return z * _sigmoid(z)
    elif activation.name == "hardswish":
        return z * _hardsigmoid(z)
    elif activation.name == "gelu":
        return z * _normal(z)
    elif activation.name == "gelu_tanh":
        return z * _nearly_normal(z)
    else:
        tl.static_assert(activation.name == "sigmoid")
        return _sigmoid(z)


@triton.jit
def takes_first_slope(z, activation: tl.constexpr):
    """Where of the two values of its derivative the first one holds; False where it is 0 or the second."""
    if activation.name == "relu":
        return ~(z <= 0)
    elif activation.name == "relu6":
        return ~((z <= 0) | (z >= 6))
    elif activation.name == "leaky_relu":
        return z > 0
    else:
        tl.static_assert(activation.name == "hardsigmoid")
        return (z > -3) & (z < 3)


@triton.jit
def gradient_by_bits(dy, first, activation: tl.constexpr):
    """dy times the first value of the derivative or the second. A select: 0·inf would be NaN."""
    if activation.name == "leaky_relu":
        return tl.where(first, dy, dy * activation.negative_slope)
    elif activation.name == "hardsigmoid":
        return tl.where(first, dy * (1 / 6), 0)
    else:
        return tl.where(first, dy, 0)


@triton.jit
def gradient_at(dy, z, inside, activation: tl.constexpr):
    """dy times the derivative at ``z``. Outside the activation, where dy is 0, it is 0 whatever z."""
    NAME: tl.constexpr = activation.name
    if NAME == "relu" or NAME == "relu6" or NAME == "leaky_relu" or NAME == "hardsigmoid":
        return gradient_by_bits(dy, takes_first_slope(z, activation), activation)
    else:
        return tl.where(inside, _smooth_gradient(dy, z, NAME), 0)


@triton.jit
def _smooth_gradient(dy, z, NAME: tl.constexpr):
    """dy times the derivative at ``z``, of an activation whose derivative has more than two values."""
    if NAME == "silu":
        s = _sigmoid(z)
        return dy * s * (1 + z * (1 - s))
    elif NAME == "hardswish":
        return tl.where(z <= -3, 0, tl.where((z > -3) & (z < 3), dy * (z * (1 / 3) + 0.5), dy))
    elif NAME == "gelu":
        return dy * (_normal(z) + z * (_DENSITY * tl.exp2(z * z * (-0.5 * _LOG2_E))))
    elif NAME == "gelu_tanh":
        p = _nearly_normal(z)
        # Beyond this bound of z² p is 0 or 1: an infinite one would make 0·inf.
        return dy * (p + z * (p * (1 - p)) * (_A + 3 * _B * tl.minimum(z * z, 1e9)))
    else:
        tl.static_assert(NAME == "sigmoid")
        s = _sigmoid(z)
        return dy * (1 - s) * s


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)), from a reciprocal root: as exact as a division, in half the instructions."""
    root = tl.rsqrt(1 + tl.exp2(z * -_LOG2_E))
    return root * root


@triton.jit
def _hardsigmoid(z):
    return tl.where(z <= -3, 0, tl.where(z >= 3, 1, (z + 3) * (1 / 6)))


@triton.jit
def _normal(z):
    """The normal distribution's cumulative function."""
    return 0.5 * (1 + tl.erf(z * _SQRT_HALF))


@triton.jit
def _nearly_normal(z):
    """Its approximation by a tanh."""
    return _sigmoid(z * (_A + _B * (z * z)))
