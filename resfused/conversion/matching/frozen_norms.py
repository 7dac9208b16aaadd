"""Norms written as x * scale + (bias - mean * scale), with scale = weight * (var + eps).rsqrt(), as one call each.

So do torchvision, timm, transformers and those who copied them write what is neither trained nor updated.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..calls import frozen_batch_norm

_ADD, _SUB, _MUL = (operator.add, torch.add, "add"), (operator.sub, torch.sub, "sub"), (operator.mul, torch.mul, "mul")
_RSQRT = (torch.rsqrt, "rsqrt")
_RESHAPE = ("reshape", "view")
_BY_CHANNEL = (1, -1, 1, 1)


def call_frozen_norms(graph: fx.Graph) -> None:
    """Puts a call of ``frozen_batch_norm`` in the place of each."""
    for node in list(graph.nodes):
        given = _frozen_norm(node)
        if given is None:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(frozen_batch_norm, given))
        _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """And what was there for it alone."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase(graph, each)


def _frozen_norm(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of the call that the node's value is."""
    for product, shift in _commuted(node, _ADD):
        for x, scale in _commuted(product, _MUL):
            for weight, root in _commuted(scale, _MUL):
                bias, shifted = _operands(shift, _SUB)
                numbers = _operands(_operands(root, _RSQRT, 1)[0], _ADD)
                eps = next((number for number in numbers if type(number) in (int, float)), None)
                variances = [value for value in numbers if value is not eps]
                means = [mean for mean, factor in _commuted(shifted, _MUL) if factor is scale]
                vectors = [_vector(t) for t in (*means, *variances, weight, bias)]
                if len(vectors) == 4 and None not in vectors and eps is not None:
                    return x, *vectors, eps
    return None


def _operands(node: object, targets: tuple[Any, ...], number: int = 2) -> tuple[Any, ...]:
    """Of a call of one of these; None for each of anything else."""
    if not isinstance(node, fx.Node) or node.target not in targets or len(node.args) != number or node.kwargs:
        return (None,) * number
    return node.args


def _commuted(node: object, targets: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """The two operands in both orders."""
    operands = _operands(node, targets)
    return operands, operands[::-1]


def _vector(node: object) -> fx.Node | None:
    """The parameter or buffer that is reshaped so that it is broadcast over an activation's channels."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in _RESHAPE:
        return None
    vector, *shape = node.args
    is_one = isinstance(vector, fx.Node) and vector.op == "get_attr"
    return vector if is_one and tuple(shape) == _BY_CHANNEL else None  # type: ignore[return-value]
