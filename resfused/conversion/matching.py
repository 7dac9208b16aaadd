"""Where a torch.fx graph computes relu(norm(x) + s), and the same graph with one call there."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..norms import is_norm, is_watched
from .calls import functional_tail, tail_pair
from .reading.tracing import Read

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd, "add_")
_FRESH = ("torch.nn.modules.conv", "torch.nn.modules.linear", "torch.nn.modules.batchnorm", "torch.nn.modules.pooling")
_FRESH_FUNCTIONS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, torch.add, torch.sub, torch.mul,
    torch.div, torch.matmul, torch.cat, torch.stack, F.batch_norm, F.conv1d, F.conv2d, F.conv3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.sum, torch.mean, tail_pair, functional_tail,
)  # fmt: skip
_FRESH_METHODS = ("add", "sub", "mul", "div", "matmul", "sum", "mean")
_SHAPE = ("ndim", "shape")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT = inspect.signature(F.dropout)
_BATCH_NORM = inspect.signature(F.batch_norm)


@dataclass(frozen=True)
class Site:
    """One place: its form, the paths of its norms, whether they are calls of ``F.batch_norm``, the modules that are not
    called any more, its output."""

    form: str
    norms: tuple[str, ...]
    functional: bool
    skipped: tuple[str, ...]
    output: fx.Node = field(compare=False, repr=False)

    def __str__(self) -> str:
        """The form and the norms, of which one may be the module itself."""
        norms = ", ".join(filter(None, self.norms))
        return f"{self.form} ({norms})" if norms else self.form


class Operand(NamedTuple):
    """A norm's call, and the identities between it and where its output is used; the last of them first."""

    norm: fx.Node
    passed: tuple[fx.Node, ...]


def is_relu(module: object) -> bool:
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward


def is_fresh(module: object) -> bool:
    """Whether its output is a tensor of its own, and its input left as it is."""
    return isinstance(module, nn.Module) and type(module).__module__ in _FRESH


class Matcher:
    """The sites of one graph, whose calls are of submodules of ``root``."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        training: bool,
        allowed: Callable[[nn.Module], bool],
        gives_fresh: Callable[[nn.Module], bool] = is_fresh,
    ):
        """``allowed``: whether a norm may be fused; ``gives_fresh``: whether a module returns a tensor of its own."""
        self.graph = graph
        self.root = root
        self.training = training
        self.allowed = allowed
        self.gives_fresh = gives_fresh
        self.relied_on: set[str] = set()
        """Modules that had to be of a known class: one that changes its input in place would not have done."""
        self.taken_for_granted: list[Read] = []
        """Values of theirs, without which they would compute something else."""

    def module(self, node: object) -> nn.Module | None:
        """What a call_module node calls."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def relus(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if self.is_relu(node)]

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELUS and isinstance(node.args[0], fx.Node)
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        module = self.module(node)
        return is_relu(module) and is_plain_call(node) and not is_watched(module)  # type: ignore[arg-type]

    def peel(self, node: object) -> tuple[object, tuple[fx.Node, ...]]:
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
            known = type(module) is nn.Identity or (type(module) in _DROPOUTS and self._drops_nothing(module))
            return known and is_plain_call(node) and not is_watched(module)
        if node.op != "call_function" or len([a for a in node.args if isinstance(a, fx.Node)]) != 1:
            return False
        if node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
            return any(type(value) in (int, float) and value == 0 for value in node.args)
        return node.target is F.dropout and self._has_no_effect(**_arguments(_DROPOUT, node))

    def _drops_nothing(self, dropout: Any) -> bool:
        return dropout.p == 0 or not self.training

    @staticmethod
    def _has_no_effect(input: fx.Node, p: float, training: bool, inplace: bool) -> bool:
        return p == 0 or training is False

    def addends(self, node: object) -> tuple[fx.Node, fx.Node] | None:
        """What an addition adds, if it is one of two values."""
        if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
            return None
        known = node.target in (_ADDITIONS if node.op == "call_function" else ("add", "add_"))
        if node.op not in ("call_function", "call_method") or not known:
            return None
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None

    def is_norm_call(self, node: object) -> bool:
        module = self.module(node)
        if module is not None:
            return is_norm(module) and is_plain_call(node)  # type: ignore[arg-type]
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target is F.batch_norm

    def fuse(self) -> list[Site]:
        """Rewrites every site that can be; the sites."""
        return [site for node in self.relus() if (site := self._fuse_at(node)) is not None]

    def _fuse_at(self, relu: fx.Node) -> Site | None:
        source, passed = self.peel(relu.args[0])
        operand = self._operand(source, ())
        if operand is not None:
            return self._rewrite(relu, None, passed, operand, None, None)
        source = self._norm_last(source)
        pair = self.addends(source)
        if pair is None or len(uses(source)) != 1:  # type: ignore[arg-type]
            return None
        operands = [self._operand(*self.peel(addend)) for addend in pair]
        addition: fx.Node = source  # type: ignore[assignment]
        if not any(operands) or self._changes_others(addition, operands):
            return None
        if self._mutations(addition, relu, {*passed}, pair):
            return None
        first = 0 if operands[0] is not None else 1
        main, other = operands[first], operands[1 - first]
        if main is None:
            return None
        if other is not None and self._is_functional(main) != self._is_functional(other):
            other = None
        return self._rewrite(relu, addition, passed, main, pair[1 - first], other)

    def _norm_last(self, node: object) -> object:
        """Of (norm(x) + a) + b the sum norm(x) + (a + b): several addends, of which none of the last two is a norm."""
        outer = self.addends(node)
        if outer is None or node.target in _IN_PLACE or any(self._operand(*self.peel(a)) for a in outer):  # type: ignore[attr-defined]
            return node
        for inner, b in (outer, outer[::-1]):
            pair = self.addends(inner)
            if pair is None or len(uses(inner)) != 1 or inner.target in _IN_PLACE:
                continue
            for norm, a in (pair[::-1], pair):
                if self._operand(*self.peel(norm)) is None:
                    continue
                with self.graph.inserting_before(node):  # type: ignore[arg-type]
                    rest = self.graph.call_function(operator.add, (a, b))
                    whole = self.graph.call_function(operator.add, (norm, rest))
                node.replace_all_uses_with(whole)  # type: ignore[attr-defined]
                for each in (node, inner):
                    self.graph.erase_node(each)  # type: ignore[arg-type]
                return whole
        return node

    def _operand(self, node: object, passed: tuple[fx.Node, ...]) -> Operand | None:
        """The norm whose call ``node`` is, if it may be moved to the ReLU."""
        if not self.is_norm_call(node) or len(uses(node)) != 1:  # type: ignore[arg-type]
            return None
        call: fx.Node = node  # type: ignore[assignment]
        norm = self.root.get_submodule(self._norm_path(call))
        if isinstance(norm, _BatchNorm) and not self.allowed(norm):
            return None
        if call.op == "call_module" and (is_watched(norm) or not is_called_once(self.graph, str(call.target))):
            return None
        return Operand(call, passed)

    def _is_functional(self, operand: Operand) -> bool:
        return operand.norm.op == "call_function"

    def _changes_others(self, addition: fx.Node, operands: list[Operand | None]) -> bool:
        """Whether it adds in place to something that others may hold."""
        if addition.target not in _IN_PLACE or operands[0] is not None:
            return False
        target: fx.Node = addition.args[0]  # type: ignore[assignment]
        return len(uses(target)) != 1 or not self.is_fresh(target)

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
        if node.target in _IN_PLACE:
            # What it gives is its first argument.
            return len(uses(node.args[0])) == 1 and self.is_fresh(node.args[0])  # type: ignore[arg-type]
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS

    def _mutations(self, first: fx.Node, last: fx.Node, harmless: set[fx.Node], read: tuple[fx.Node, ...]) -> bool:
        """Whether anything between the two may change one of the tensors ``read`` in place."""
        node = first.next
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
        in_place = node.op != "call_module" or is_relu(self.module(node))
        return apart and in_place and self.is_fresh(changed)

    def _may_mutate(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "placeholder"):
            return False
        if node.op == "call_module":
            return not self._relies_on(node, lambda module: is_fresh(module) or type(module) is nn.Identity)
        name = str(getattr(node.target, "__name__", node.target))
        in_place = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
        return name.endswith("_") or in_place or bool(node.kwargs.get("inplace"))

    def _relies_on(self, node: fx.Node, known: Callable[[nn.Module], bool]) -> bool:
        """Whether it calls a module that is known, and has no hooks."""
        module = self.module(node)
        if module is None or not known(module) or is_watched(module):
            return False
        self.relied_on.add(str(node.target))
        return True

    def _rewrite(
        self,
        relu: fx.Node,
        addition: fx.Node | None,
        passed: tuple[fx.Node, ...],
        main: Operand,
        residual: fx.Node | None,
        other: Operand | None,
    ) -> Site | None:
        operands = [o for o in (main, other) if o is not None]
        pattern = {*passed, *(n for o in operands for n in (o.norm, *o.passed))} | ({addition} if addition else set())
        for operand in operands:
            source: fx.Node = operand.norm.args[0]  # type: ignore[assignment]
            alone = len(uses(source)) == 1 and source.op != "placeholder"
            if self._mutations(operand.norm, relu, pattern, (source,)) and not alone:
                return None
        for operand in operands:
            # The shape of a norm's output is its input's.
            for reader in set(operand.norm.users) - set(uses(operand.norm)):
                reader.replace_input_with(operand.norm, operand.norm.args[0])  # type: ignore[arg-type]
        with self.graph.inserting_before(relu):
            kept = self._kept(addition, residual)
            if self._is_functional(main):
                fused = self._functional(main, residual, other, kept)
            else:
                fused = self._tail(main, residual, other, kept)
        relu.replace_all_uses_with(fused)
        skipped = [n for n in (relu, *pattern) if n.op == "call_module" and n not in [o.norm for o in operands]]
        for node in skipped:
            self._take_for_granted(str(node.target))
        norms = tuple(self._norm_path(o.norm) for o in operands)
        for node in sorted((relu, *pattern), reverse=True):
            self.graph.erase_node(node)
        form = "norm+relu" if residual is None else "norm+add+relu" if other is None else "norm+add(norm)+relu"
        return Site(form, norms, self._is_functional(main), tuple(sorted({str(n.target) for n in skipped})), fused)

    def _take_for_granted(self, path: str) -> None:
        module = self.root.get_submodule(path)
        if isinstance(module, _DROPOUTS):
            self.taken_for_granted.append(Read(path, "p", 0.0) if module.p == 0 else Read(path, "training", False))

    def _norm_path(self, norm: fx.Node) -> str:
        """Of a call of ``F.batch_norm``: the module that has its statistics or weight."""
        if norm.op == "call_module":
            return str(norm.target)
        for value in _arguments(_BATCH_NORM, norm).values():
            if isinstance(value, fx.Node) and value.op == "get_attr":
                return str(value.target).rpartition(".")[0]
        return ""

    def _kept(self, addition: fx.Node | None, residual: fx.Node | None) -> str | None:
        """Whose dtype the sum has, see ``calls.tail_pair``."""
        if addition is None or addition.target not in _IN_PLACE:
            return None
        return "residual" if addition.args[0] is residual else "input"

    def _tail(self, main: Operand, residual: fx.Node | None, other: Operand | None, kept: str | None) -> fx.Node:
        norm = self.graph.get_attr(str(main.norm.target))
        residual_norm = None
        if other is not None:
            residual, residual_norm = other.norm.args[0], self.graph.get_attr(str(other.norm.target))  # type: ignore[assignment]
        pair = self.graph.call_function(tail_pair, (norm, main.norm.args[0], residual, residual_norm, kept, False))
        return self.graph.call_function(operator.getitem, (pair, 0))

    def _functional(self, main: Operand, residual: fx.Node | None, other: Operand | None, kept: str | None) -> fx.Node:
        own = tuple(_arguments(_BATCH_NORM, main.norm).values())
        second = None if other is None else tuple(_arguments(_BATCH_NORM, other.norm).values())
        residual = residual if second is None else None
        return self.graph.call_function(functional_tail, (own, residual, second, kept))


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


def _arguments(signature: inspect.Signature, node: fx.Node) -> dict[str, Any]:
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
