"""Where a torch.fx graph computes activation(norm(x) + s), and the same graph with one call there."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from ...frozen import is_frozen_norm
from ...kernels.activation import IDENTITY
from ...norms import is_batch_norm, is_watched
from ..calls import frozen_batch_norm, frozen_tail, functional_tail, tail_pair
from ..reading.tracing import Read
from .activations import attributes
from .effects import IN_PLACE_ADDITIONS, Effects, is_fresh
from .nodes import arguments, is_called_once, uses
from .reader import NORM_FUNCTIONS, Applied, is_dropout

_SIGNATURES = {function: inspect.signature(function) for function in NORM_FUNCTIONS}
_TAILS = {F.batch_norm: functional_tail, frozen_batch_norm: frozen_tail}


@dataclass(frozen=True)
class Site:
    """One place: its form, the paths of its norms, whether they are calls of functions, whether they are frozen ones,
    the modules that are not called any more, its output."""

    form: str
    norms: tuple[str, ...]
    functional: bool
    frozen: bool
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


class Sum(NamedTuple):
    """An addition to a norm's output: of what, which may be the output of another norm."""

    addition: fx.Node
    residual: fx.Node
    other: Operand | None


class Matcher(Effects):
    """The sites of one graph."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        training: bool,
        allowed: Callable[[nn.Module], bool],
        gives_fresh: Callable[[nn.Module], bool] = is_fresh,
    ):
        """``allowed``: whether a norm may be fused; ``gives_fresh``: whether a module returns a tensor of its own."""
        super().__init__(graph, root, training, gives_fresh)
        self.allowed = allowed
        self.taken_for_granted: list[Read] = []
        """Values of modules, without which they would compute something else."""

    def fuse(self) -> list[Site]:
        """Rewrites every site that can be, those with an activation first, norms alone last; the sites."""
        sites = [self._fuse_activated(node) for node in self._all(self.applied)]
        sites += [self._fuse_sum(Applied(IDENTITY, node, ())) for node in self._all(self.addends)]
        sites += [self._fuse_norm(node) for node in self._all(self.is_norm_call)]
        return [site for site in sites if site is not None]

    def _all(self, is_wanted: Callable[[fx.Node], object]) -> list[fx.Node]:
        return [node for node in self.graph.nodes if is_wanted(node)]

    def _fuse_activated(self, node: fx.Node) -> Site | None:
        # Not before: the sites before it have changed what it is applied to.
        place: Applied = self.applied(node)  # type: ignore[assignment]
        source, passed = self.peel(place.source)
        place = Applied(place.activation, source, (*passed, *place.nodes))
        operand = self._operand(source, (), {*place.nodes})
        if operand is not None:
            return self._rewrite(place, operand, None)
        if not {*uses(source)} <= {*place.nodes}:
            return None
        return self._fuse_sum(place._replace(source=self._norm_last(source)))

    def _fuse_sum(self, place: Applied) -> Site | None:
        addition = place.source
        pair = self.addends(addition)
        if pair is None:
            return None
        peeled = [self.peel(addend) for addend in pair]
        operands = [self._operand(node, passed, {addition, *passed}) for node, passed in peeled]
        first = 0 if operands[0] is not None else 1
        main, other = operands[first], operands[1 - first]
        if main is None or (operands[0] is None and self.changes_others(addition)):
            return None
        if self.may_change(pair, addition, place.value, {*place.nodes}):
            return None
        if other is not None and self._function(main) is not self._function(other):
            other = None
        return self._rewrite(place, main, Sum(addition, pair[1 - first], other))

    def _fuse_norm(self, node: fx.Node) -> Site | None:
        if not self._may_fuse(node) or not is_batch_norm(self._norm(node)):
            return None
        return self._rewrite(Applied(IDENTITY, node, ()), Operand(node, ()), None)

    def _norm_last(self, node: fx.Node) -> fx.Node:
        """Of (norm(x) + a) + b the sum norm(x) + (a + b): several addends, of which none of the last two is a norm."""
        outer = self.addends(node)
        if outer is None or node.target in IN_PLACE_ADDITIONS or any(self._addend(a, node) for a in outer):
            return node
        for inner, b in (outer, outer[::-1]):
            pair = self.addends(inner)
            if pair is None or len(uses(inner)) != 1 or inner.target in IN_PLACE_ADDITIONS:
                continue
            for norm, a in (pair[::-1], pair):
                if self._addend(norm, inner) is None:
                    continue
                with self.graph.inserting_before(node):
                    rest = self.graph.call_function(operator.add, (a, b))
                    whole = self.graph.call_function(operator.add, (norm, rest))
                node.replace_all_uses_with(whole)
                for each in (node, inner):
                    self.graph.erase_node(each)
                return whole
        return node

    def _addend(self, node: fx.Node, addition: fx.Node) -> Operand | None:
        """The norm whose output is added, if it may be moved to where it is."""
        source, passed = self.peel(node)
        return self._operand(source, passed, {addition, *passed})

    def _operand(self, node: fx.Node, passed: tuple[fx.Node, ...], users: set[fx.Node]) -> Operand | None:
        """The norm whose call ``node`` is, if it may be moved to the only ``users`` of its output."""
        if not self._may_fuse(node) or not {*uses(node)} <= users:
            return None
        if node.op == "call_module" and not is_called_once(self.graph, str(node.target)):
            return None
        return Operand(node, passed)

    def _may_fuse(self, node: fx.Node) -> bool:
        if not self.is_norm_call(node):
            return False
        norm = self._norm(node)
        if is_batch_norm(norm) and not self.allowed(norm):
            return False
        return node.op == "call_function" or not is_watched(norm)

    def _function(self, operand: Operand) -> Any:
        """Which of ``NORM_FUNCTIONS`` the norm calls; None for a module."""
        return operand.norm.target if operand.norm.op == "call_function" else None

    def _is_frozen(self, operand: Operand) -> bool:
        return self._function(operand) is frozen_batch_norm or is_frozen_norm(self.module(operand.norm))

    def _rewrite(self, place: Applied, main: Operand, added: Sum | None) -> Site | None:
        operands = [main] if added is None or added.other is None else [main, added.other]
        pattern = {*place.nodes, *(n for o in operands for n in (o.norm, *o.passed))}
        if added is not None:
            pattern.add(added.addition)
        for operand in operands:
            source: fx.Node = operand.norm.args[0]  # type: ignore[assignment]
            alone = len(uses(source)) == 1 and source.op != "placeholder"
            if self.may_change((source,), operand.norm, place.value, pattern) and not alone:
                return None
        for operand in operands:
            # The shape of a norm's output is its input's.
            for reader in set(operand.norm.users) - set(uses(operand.norm)):
                reader.replace_input_with(operand.norm, operand.norm.args[0])  # type: ignore[arg-type]
        with self.graph.inserting_before(place.value):
            call = self._tail if self._function(main) is None else self._functional
            fused = call(place, main, added)
        place.value.replace_all_uses_with(fused)
        skipped = [n for n in pattern if n.op == "call_module" and n not in [o.norm for o in operands]]
        for node in skipped:
            self._take_for_granted(str(node.target))
        norms = tuple(self._norm_path(o.norm) for o in operands)
        for node in sorted(pattern, reverse=True):
            self.graph.erase_node(node)
        paths = tuple(sorted({str(node.target) for node in skipped}))
        functional, frozen = self._function(main) is not None, all(map(self._is_frozen, operands))
        return Site(_form(place, added), norms, functional, frozen, paths, fused)

    def _take_for_granted(self, path: str) -> None:
        module = self.root.get_submodule(path)
        values = attributes(module)
        if is_dropout(module):
            values = {"p": 0.0} if module.p == 0 else {"training": False}
        self.taken_for_granted += [Read(path, name, value) for name, value in values.items()]

    def _norm(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(self._norm_path(node))

    def _norm_path(self, norm: fx.Node) -> str:
        """Of a call of a function: the module that has its statistics or weight."""
        if norm.op == "call_module":
            return str(norm.target)
        for value in _arguments(norm):
            if isinstance(value, fx.Node) and value.op == "get_attr":
                return str(value.target).rpartition(".")[0]
        return ""

    def _tail(self, place: Applied, main: Operand, added: Sum | None) -> fx.Node:
        norm = self.graph.get_attr(str(main.norm.target))
        residual, residual_norm = None if added is None else added.residual, None
        if added is not None and added.other is not None:
            other = added.other.norm
            residual, residual_norm = other.args[0], self.graph.get_attr(str(other.target))  # type: ignore[assignment]
        given = (norm, main.norm.args[0], residual, residual_norm, place.activation, _kept(added), False)
        pair = self.graph.call_function(tail_pair, given)
        return self.graph.call_function(operator.getitem, (pair, 0))

    def _functional(self, place: Applied, main: Operand, added: Sum | None) -> fx.Node:
        own = _arguments(main.norm)
        residual, second = None if added is None else added.residual, None
        if added is not None and added.other is not None:
            residual, second = None, _arguments(added.other.norm)
        return self.graph.call_function(
            _TAILS[self._function(main)], (own, residual, second, place.activation, _kept(added))
        )


def _arguments(call: fx.Node) -> tuple[Any, ...]:
    """Of a call of one of ``NORM_FUNCTIONS``."""
    return tuple(arguments(_SIGNATURES[call.target], call).values())  # type: ignore[index]


def _form(place: Applied, added: Sum | None) -> str:
    head = "norm" if added is None else "norm+add" if added.other is None else "norm+add(norm)"
    return head if place.activation == IDENTITY else f"{head}+{place.activation.name}"


def _kept(added: Sum | None) -> str | None:
    """Whose dtype the sum has, see ``calls.tail_pair``."""
    if added is None or added.addition.target not in IN_PLACE_ADDITIONS:
        return None
    return "residual" if added.addition.args[0] is added.residual else "input"
