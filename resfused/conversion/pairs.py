"""A value that two things use, as a pair: its two gradients are then added inside the backward that made it."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..norms import is_norm
from .calls import frozen_batch_norm, frozen_tail, functional_tail, tail_pair
from .fused_forward import forked_call
from .matching.effects import is_fresh
from .matching.nodes import reads_shape

_READS = (
    tail_pair, functional_tail, frozen_tail, frozen_batch_norm, getattr, operator.add, torch.add, F.batch_norm,
    F.conv1d, F.conv2d, F.conv3d, F.linear, F.avg_pool2d, F.adaptive_avg_pool2d, torch.conv1d, torch.conv2d,
    torch.conv3d,
)  # fmt: skip


def pair_call(node: object) -> fx.Node | None:
    """The call of which ``node`` is the first of two results."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != 0:
        return None
    call = node.args[0]
    return call if isinstance(call, fx.Node) and call.target in (tail_pair, forked_call) else None


def call_for_pair(graph: fx.Graph, node: fx.Node) -> None:
    """Puts a ``forked_call`` in the place of the call of a module."""
    with graph.inserting_before(node):
        module = graph.get_attr(str(node.target))
        call = graph.call_function(forked_call, (module, node.args[0], node.args[0], False))
        value = graph.call_function(operator.getitem, (call, 0))
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def hand_on(graph: fx.Graph, maker: fx.Node, taker: fx.Node) -> None:
    """The pair of ``maker`` to ``taker``, a ``forked_call`` that is the only user of its value."""
    maker.update_arg(len(maker.args) - 1, True)
    with graph.inserting_before(taker):
        twin = graph.call_function(operator.getitem, (maker, 1))
    taker.update_arg(2, twin)


def split_input(graph: fx.Graph, x: fx.Node, shortcut: fx.Node) -> None:
    """Gives the last use of ``x`` to ``shortcut``: the whole second half, or one of several uses."""
    last = max(x.users)
    if last.target is forked_call and len(x.users) == 1:
        last.update_arg(2, shortcut)
    else:
        last.replace_input_with(x, shortcut)


def open_ends(graph: fx.Graph, x: fx.Node, output: fx.Node, maker: fx.Node | None, takes_pair: bool) -> None:
    """Makes it the graph of ``forward(self, x, shortcut, forked)``, which returns a pair, that of ``maker`` if any."""
    with graph.inserting_after(x):
        shortcut = graph.placeholder(f"{x.target}_shortcut")
    with graph.inserting_after(shortcut):
        forked = graph.placeholder(f"{x.target}_forked")
    if takes_pair:
        split_input(graph, x, shortcut)
    result = output.args[0]
    twin = result
    if maker is not None:
        maker.update_arg(len(maker.args) - 1, forked)
        with graph.inserting_before(output):
            twin = graph.call_function(operator.getitem, (maker, 1))
    output.update_arg(0, (result, twin))


Inner = Callable[[nn.Module, fx.Node], fx.Graph | None]
"""The graph of a submodule with code of its own, as a node calls it."""


def readers(graph: fx.Graph, root: nn.Module, node: fx.Node, inner: Inner) -> list[str] | None:
    """The submodules of ``root`` that are given the value, where all that is done with it is to read it; else None."""
    found: list[str] = []
    for user in node.users:
        more = _reader(graph, root, user, node, inner)
        if more is None:
            return None
        found += more
    return found


def _reader(graph: fx.Graph, root: nn.Module, user: fx.Node, node: fx.Node, inner: Inner) -> list[str] | None:
    if reads_shape(user):
        return []
    if user.op == "call_function":
        return _function_reader(user, node)
    if user.op != "call_module":
        return None
    path = str(user.target)
    module = root.get_submodule(path)
    if is_fresh(module) or is_norm(module):
        return [path]
    if type(module) is nn.Identity:
        further = readers(graph, root, user, inner)
        return None if further is None else [path, *further]
    child = inner(module, user)
    if child is None or len(user.args) != 1 or user.kwargs:
        return None
    (x,) = child.find_nodes(op="placeholder")[:1]
    further = readers(child, module, x, inner)
    return None if further is None else [path, *(f"{path}.{p}" for p in further)]


def _function_reader(user: fx.Node, node: fx.Node) -> list[str] | None:
    if user.target is operator.iadd:
        return [] if user.args[0] is not node else None
    return [] if user.target in _READS else None
