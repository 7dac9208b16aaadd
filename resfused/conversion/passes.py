"""How often a training step of one place reads or writes the activation, in half precision, where a mask is 1/16."""

from __future__ import annotations

from ..kernels.activation import IDENTITY, Activation

_NORMS = {"": 8.0, "add": 11.0, "add(norm)": 19.0}
_FROZEN_NORMS = {"": 6.0, "add": 9.0, "add(norm)": 15.0}
_FORK = 3.0
_MASK = 1 / 16


def eager(form: str, forked: bool = False, frozen: bool = False) -> float:
    """Of PyTorch's operators: an activation is one of its own, and so is the sum of the gradients of two uses.

    A frozen norm is a product and a sum, of which the product alone has a backward.
    """
    added, activation = _parts(form)
    norms = _FROZEN_NORMS if frozen else _NORMS
    return norms[added] + (0.0 if activation == IDENTITY else 5.0) + (_FORK if forked else 0.0)


def ours(form: str, forked: bool = False, frozen: bool = False) -> float:
    """Of kernels in two phases. Of a residual without a norm they keep a mask; or where the activation is smooth, read
    it again; or where there is none give it the gradient that came."""
    added, activation = _parts(form)
    if frozen:
        return _ours_frozen(added, activation, forked)
    if added != "add":
        return (8.0 if not added else 13.0) + (2.0 if forked else 0.0)
    if activation == IDENTITY:
        return 9.0 + (2.0 if forked else 0.0)
    return 10.0 + (1.0 if activation.slopes is None else 2 * _MASK) + (1.0 if forked else 0.0)


def _ours_frozen(added: str, activation: Activation, forked: bool) -> float:
    """One phase in each direction, which reads a mask, or where the activation is smooth z: x alone, or the sum that an
    activation of PyTorch's is then taken of."""
    if not added:
        return (5.0 if activation.slopes is None else 4.0 + 2 * _MASK * (activation != IDENTITY)) + float(forked)
    passed_on = added == "add" and (activation == IDENTITY or activation.slopes is None)
    sums = 5.0 if passed_on else 6.0
    if activation == IDENTITY:
        return sums + ((2.0 if passed_on else 1.0) if forked else 0.0)
    if activation.slopes is None:
        return sums + 5.0 + (_FORK if forked else 0.0)
    return sums + 2 * _MASK + float(forked)


def _parts(form: str) -> tuple[str, Activation]:
    """What is added, and the activation; their words are those of ``Fused.form``."""
    _, *rest = form.split("+")
    added = rest.pop(0) if rest and rest[0] in _NORMS else ""
    return added, Activation(rest[0]) if rest else IDENTITY
