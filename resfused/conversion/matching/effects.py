"""What the calls of a graph change in place, and which values are tensors that nobody else holds."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...norms import is_norm, is_watched
from ..calls import frozen_batch_norm, frozen_tail, functional_tail, tail_pair
from .activations import computed
from .nodes import changes_in_place, uses
from .reader import Reader

IN_PLACE_ADDITIONS = (operator.iadd, "add_")
_FRESH = ("torch.nn.modules.conv", "torch.nn.modules.linear", "torch.nn.modules.batchnorm", "torch.nn.modules.pooling")
_FRESH_FUNCTIONS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, torch.add, torch.sub, torch.mul,
    torch.div, torch.matmul, torch.cat, torch.stack, F.batch_norm, F.conv1d, F.conv2d, F.conv3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.sum, torch.mean, tail_pair, functional_tail, frozen_batch_norm,
    frozen_tail,
)  # fmt: skip
_FRESH_METHODS = ("add", "sub", "mul", "div", "matmul", "sum", "mean")


def is_fresh(module: object) -> bool:
    """Whether its output is a tensor of its own, and its input left as it is."""
    return isinstance(module, nn.Module) and (type(module).__module__ in _FRESH or is_norm(module))


class Effects(Reader):
    """``gives_fresh``: whether a module returns a tensor of its own."""

    def __init__(self, graph: fx.Graph, root: nn.Module, training: bool, gives_fresh: Callable[[nn.Module], bool]):
        super().__init__(graph, root, training)
        self.gives_fresh = gives_fresh
        self.relied_on: set[str] = set()
        """Modules that had to be of a known class: one that changes its input in place would not have done."""

    def is_fresh(self, node: object) -> bool:
        """Whether it is a tensor that was made here, and that no other shares memory with."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            if self.is_identity(node):
                return len(uses(node.args[0])) == 1 and self.is_fresh(node.args[0])  # type: ignore[arg-type]
            return self._relies_on(node, self.gives_fresh)
        if node.op == "call_method" and node.target in _FRESH_METHODS:
            return True
        if node.op == "call_function" and node.target is operator.getitem:
            return getattr(node.args[0], "target", None) is tail_pair
        if node.target in IN_PLACE_ADDITIONS:
            # What it gives is its first argument.
            return len(uses(node.args[0])) == 1 and self.is_fresh(node.args[0])  # type: ignore[arg-type]
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS

    def changes_others(self, addition: fx.Node) -> bool:
        """Whether it adds in place to something that others may hold."""
        if addition.target not in IN_PLACE_ADDITIONS:
            return False
        target: fx.Node = addition.args[0]  # type: ignore[assignment]
        return len(uses(target)) != 1 or not self.is_fresh(target)

    def may_change(self, read: tuple[fx.Node, ...], first: fx.Node, last: fx.Node, harmless: set[fx.Node]) -> bool:
        """Whether anything between the two may change one of the tensors ``read`` in place."""
        node = first if first is last else first.next
        while node is not last:
            if node not in harmless and self._may_mutate(node) and not self._changes_another(node, read):
                return True
            node = node.next
        return False

    def _changes_another(self, node: fx.Node, read: tuple[fx.Node, ...]) -> bool:
        """Whether what it changes is a counter, or was made here and is none of the tensors ``read``."""
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node):
            return False
        if changed.op == "get_attr":
            path, _, name = str(changed.target).rpartition(".")
            tensor = getattr(self.root.get_submodule(path), name)
            return isinstance(tensor, Tensor) and not tensor.is_floating_point()
        apart = changed not in read and all(each.op == "placeholder" or self.is_fresh(each) for each in read)
        in_place = node.op != "call_module" or computed(self.module(node)) is not None
        return apart and in_place and self.is_fresh(changed)

    def _may_mutate(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "placeholder"):
            return False
        if node.op == "call_module":
            return not self._relies_on(node, lambda module: is_fresh(module) or type(module) is nn.Identity)
        return changes_in_place(node)

    def _relies_on(self, node: fx.Node, known: Callable[[nn.Module], bool]) -> bool:
        """Whether it calls a module that is known, and has no hooks."""
        module = self.module(node)
        if module is None or not known(module) or is_watched(module):
            return False
        self.relied_on.add(str(node.target))
        return True
