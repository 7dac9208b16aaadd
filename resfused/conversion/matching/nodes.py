"""What can be said of a graph's nodes by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx

_SHAPE = ("ndim", "shape")


def is_plain_call(node: fx.Node) -> bool:
    """Of one value, given by position."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def uses(node: fx.Node) -> list[fx.Node]:
    """The users that want more of the value than its shape."""
    return [user for user in node.users if not reads_shape(user)]


def reads_shape(user: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in ("size", "dim")
    return user.target is getattr and user.args[1] in _SHAPE


def changes_in_place(node: fx.Node) -> bool:
    """Whether what a function or method is given is not the same after it, by its name or its arguments."""
    name = str(getattr(node.target, "__name__", node.target))
    is_operator = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
    return name.endswith("_") or is_operator or bool(node.kwargs.get("inplace"))


def arguments(signature: inspect.Signature, node: fx.Node) -> dict[str, Any]:
    """Defaults filled in."""
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def calls_of(graph: fx.Graph, path: str) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_module" and node.target == path)


def is_called_once(graph: fx.Graph, path: str) -> bool:
    return len(list(calls_of(graph, path))) == 1


def result_of(graph: fx.Graph) -> object:
    """What the graph returns."""
    (output,) = graph.find_nodes(op="output")
    return output.args[0]
