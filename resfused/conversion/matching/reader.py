"""What the calls of a graph are, one at a time: activations, additions, norms, identities."""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...kernels.activation import Activation
from ...norms import is_norm, is_watched
from ..calls import frozen_batch_norm
from .activations import SIGMOID, SILU, called, computed
from .nodes import arguments, changes_in_place, is_plain_call, uses

NORM_FUNCTIONS = (F.batch_norm, frozen_batch_norm)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"
Value = TypeVar("Value", fx.Node, object)


class Applied(NamedTuple):
    """An activation of ``source``, by the calls ``nodes``, of which the last gives its value; none of an identity."""

    activation: Activation
    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def value(self) -> fx.Node:
        return self.nodes[-1] if self.nodes else self.source


class Reader:
    """Of one graph, whose calls are of submodules of ``root``."""

    def __init__(self, graph: fx.Graph, root: nn.Module, training: bool):
        self.graph = graph
        self.root = root
        self.training = training

    def module(self, node: object) -> nn.Module | None:
        """What a call_module node calls."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def applied(self, node: object) -> Applied | None:
        """The activation whose value the node is."""
        if not isinstance(node, fx.Node):
            return None
        activation = self._activation(node)
        if activation is not None:
            return Applied(activation, node.args[0], (node,))  # type: ignore[arg-type]
        return self._gated(node)

    def _activation(self, node: fx.Node) -> Activation | None:
        module = self.module(node)
        if module is None:
            return called(node)
        return computed(module) if is_plain_call(node) and not is_watched(module) else None

    def _gated(self, node: fx.Node) -> Applied | None:
        """x * sigmoid(x)"""
        factors = _two_values(node, _PRODUCTS, ("mul", "mul_"))
        for x, gate in (factors, factors[::-1]) if factors else ():
            if gate.args[:1] == (x,) and self._activation(gate) == SIGMOID and len(gate.users) == 1:
                return None if changes_in_place(gate) else Applied(SILU, x, (gate, node))
        return None

    def activation_of(self, node: fx.Node) -> Applied | None:
        """The activation that is all that is made of the node's value."""
        found = uses(node)
        for user in found:
            applied = self.applied(user)
            if applied is not None and applied.source is node and {*found} <= {*applied.nodes}:
                return applied
        return None

    def peel(self, node: Value) -> tuple[Value, tuple[fx.Node, ...]]:
        """The node without the identities behind it, which nothing else uses; and they."""
        passed: list[fx.Node] = []
        while isinstance(node, fx.Node) and self.is_identity(node) and len(node.users) == 1:
            passed.append(node)
            (node,) = [value for value in node.args if isinstance(value, fx.Node)]
        return node, tuple(passed)

    def is_identity(self, node: fx.Node) -> bool:
        """Whether it gives what it is given: a dropout that drops nothing, or 0 added, does too."""
        module = self.module(node)
        if module is not None:
            known = type(module) is nn.Identity or (is_dropout(module) and self._drops_nothing(module))
            return known and is_plain_call(node) and not is_watched(module)
        if node.op != "call_function" or len([a for a in node.args if isinstance(a, fx.Node)]) != 1:
            return False
        if node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
            return any(type(value) in (int, float) and value == 0 for value in node.args)
        return _drops_nothing(node)

    def _drops_nothing(self, dropout: Any) -> bool:
        return dropout.p == 0 or not self.training

    def addends(self, node: object) -> tuple[fx.Node, fx.Node] | None:
        """What an addition adds, if it is one of two values."""
        return _two_values(node, _ADDITIONS, ("add", "add_"))

    def is_norm_call(self, node: object) -> bool:
        module = self.module(node)
        if module is not None:
            return is_norm(module) and is_plain_call(node)  # type: ignore[arg-type]
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target in NORM_FUNCTIONS


def _drops_nothing(node: fx.Node) -> bool:
    """Whether it calls a function that drops values at random, of which this call drops none."""
    function: Any = node.target
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
    if function is not F.dropout and name != _STOCHASTIC_DEPTH:
        return False
    given = arguments(inspect.signature(function), node)
    return given["p"] == 0 or given["training"] is False


def is_dropout(module: object) -> bool:
    return type(module) in _DROPOUTS


def _two_values(node: object, functions: tuple[Any, ...], methods: tuple[str, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The arguments of a call of one of these, if they are two values apart."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    if node.target not in {"call_function": functions, "call_method": methods}.get(node.op, ()):
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None
