"""A module's code with fused calls in it: the code of those submodules put in that a site has parts of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..norms import is_norm, is_watched
from ..recomputation import offer, offer_concatenation
from .fused_forward import Kind, Plan
from .matching.effects import is_fresh
from .matching.nodes import is_called_once, result_of, uses
from .matching.sites import Matcher, Site
from .reading.signature import Call, call_of, plain_call
from .reading.tracing import Container, Read, UntraceableError
from .traces import Traces

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass
class Draft:
    """A module's graph in one mode, on its way to a ``Plan``."""

    graph: fx.Graph
    reads: dict[tuple[str, str], Read]
    containers: dict[str, Container]
    kinds: dict[str, Kind] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    inlined: list[str] = field(default_factory=list)
    readers: tuple[Kind, ...] = ()
    takes_pair: bool = False
    gives_pair: bool = False
    hands_on: bool = False

    @property
    def concatenations(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.target in _CONCATENATIONS and {*n.kwargs} <= {"tensors", "dim"}]

    @property
    def depends_on_mode(self) -> bool:
        return any(name == "training" for _, name in self.reads)

    def differs(self, recomputed: Collection[str]) -> bool:
        """Whether its code is another than the module's own."""
        return bool(self.sites) or self.hands_on or (bool(recomputed) and bool(self.concatenations))

    def plan(self, recomputed: Collection[str]) -> Plan:
        for site in self.sites:
            if all(path in recomputed for path in site.norms):
                _offer_output(self.graph, site)
        for node in self.concatenations if recomputed else ():
            with self.graph.inserting_after(node):
                self.graph.call_function(offer_concatenation, (node, *node.args), node.kwargs)
        code = self.graph.python_code("self")
        return Plan(
            code.src, code.globals, self.takes_pair or self.gives_pair, self.takes_pair,
            tuple(self.reads.values()), tuple(self.containers.values()), tuple(self.kinds.values()),
            tuple(path for site in self.sites if not site.functional for path in site.norms), self.readers,
        )  # fmt: skip


def plans(drafts: list[Draft], recomputed: Collection[str] = ()) -> tuple[Plan, ...]:
    """Of the same call in training and evaluation, those that run other code than the module's own.

    ``recomputed``: the paths of the norms of whose places the output is made again in the backward.
    """
    if not any(draft.depends_on_mode for draft in drafts):
        drafts = drafts[:1]
    # What asks for the mode before what holds in both.
    ordered = sorted(drafts, key=lambda draft: not draft.depends_on_mode)
    return tuple(draft.plan(recomputed) for draft in ordered if draft.differs(recomputed))


class Drafter:
    """``allowed``: whether a norm may be fused."""

    def __init__(self, traces: Traces, allowed: Callable[[nn.Module], bool]):
        self.traces = traces
        self.allowed = allowed

    def draft(self, module: nn.Module, call: Call, training: bool) -> Draft | None:
        """None where the module cannot be traced."""
        try:
            traced = self.traces.of(module, call, training)
        except UntraceableError:
            return None
        graph = copy.deepcopy(traced.graph)
        draft = Draft(graph, {r[:2]: r for r in traced.reads}, {c.path: c for c in traced.containers})
        matcher = self.matcher(draft.graph, module, training)
        while (node := self._to_inline(matcher)) is not None:
            self._inline(draft, matcher, node)
        draft.sites = matcher.fuse()
        draft.reads |= {read[:2]: read for read in matcher.taken_for_granted}
        for path in (*(path for site in draft.sites for path in site.skipped), *sorted(matcher.relied_on)):
            draft.kinds[path] = Kind(path, type(module.get_submodule(path)))
        return draft

    def matcher(self, graph: fx.Graph, root: nn.Module, training: bool) -> Matcher:
        return Matcher(graph, root, training, self.allowed, lambda child: self._gives_fresh(child, training))

    def _gives_fresh(self, module: nn.Module, training: bool) -> bool:
        """Whether its output is a tensor of its own: attention scales a branch so."""
        if is_fresh(module):
            return True
        graph = self.traces.graph(module, plain_call(module), training)
        if graph is None:
            return False
        result = result_of(graph)
        alone = isinstance(result, fx.Node) and len(uses(result)) == 1
        return alone and self.matcher(graph, module, training).is_fresh(result)

    def _to_inline(self, matcher: Matcher) -> fx.Node | None:
        """A call of a module whose code has the norm, the identity or the activation of a site."""
        for node in matcher.graph.nodes:
            if node.op != "call_module" or not node.args:
                continue
            source = node.args[0]
            if self._computes_only(matcher, node, "an activation") and self._ends_a_site(matcher, source):
                return node
            wanted = self._ends_in_norm(matcher, node) or (
                self._computes_only(matcher, node, "nothing") and self._ends_a_site(matcher, source)
            )
            if wanted and self._reaches_a_site(matcher, node):
                return node
        return None

    def _inner(self, matcher: Matcher, node: object) -> Matcher | None:
        """Of the code of the module that ``node`` calls, where it may be put in its place."""
        module = matcher.module(node)
        if module is None or is_norm(module) or is_watched(module) or _is_leaf(module):
            return None
        graph = self.traces.graph(module, call_of(module, node), matcher.training)  # type: ignore[arg-type]
        return None if graph is None else self.matcher(graph, module, matcher.training)

    def _computes_only(self, matcher: Matcher, node: object, what: str) -> bool:
        """Whether it calls an activation, or nothing, written as a module of its own."""
        inner = self._inner(matcher, node)
        if inner is None or len(inner.graph.find_nodes(op="placeholder")) != 1:
            return False
        body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        if what == "nothing":
            source, parts = inner.peel(result_of(inner.graph))
        else:
            applied = inner.applied(result_of(inner.graph))
            source, parts = (None, ()) if applied is None else (applied.source, applied.nodes)
        return isinstance(source, fx.Node) and source.op == "placeholder" and {*body} == {*parts}

    def _ends_in_norm(self, matcher: Matcher, node: object) -> bool:
        inner = self._inner(matcher, node)
        if inner is None or not is_called_once(matcher.graph, str(node.target)):  # type: ignore[attr-defined]
            return False
        result, _ = inner.peel(result_of(inner.graph))
        while self._computes_only(inner, result, "nothing"):
            result, _ = inner.peel(result.args[0])  # type: ignore[attr-defined]
        return self._is_norm_or_ends_so(inner, result)

    def _is_norm_or_ends_so(self, matcher: Matcher, node: object) -> bool:
        return matcher.is_norm_call(node) or self._ends_in_norm(matcher, node)

    def _ends_a_site(self, matcher: Matcher, node: object) -> bool:
        """Whether an activation there would be of a norm, or of a sum with one."""
        node, _ = matcher.peel(node)
        candidates = matcher.addends(node) or (node,)
        return any(self._is_norm_or_ends_so(matcher, matcher.peel(c)[0]) for c in candidates)

    def _reaches_a_site(self, matcher: Matcher, node: fx.Node) -> bool:
        """Whether all that is done with the value, after identities, is an activation or an addition."""
        while matcher.activation_of(node) is None:
            found = uses(node)
            if len(found) != 1:
                return False
            (node,) = found
            if matcher.addends(node) is not None or self._computes_only(matcher, node, "an activation"):
                return True
            if not (matcher.is_identity(node) or self._computes_only(matcher, node, "nothing")):
                return False
        return True

    def _inline(self, draft: Draft, matcher: Matcher, node: fx.Node) -> None:
        """The graph of the module that ``node`` calls in its place."""
        module = matcher.root.get_submodule(str(node.target))
        path = str(node.target)
        call = call_of(module, node)
        assert call is not None
        traced = self.traces.of(module, call, matcher.training)
        given = iter(call.tensors)
        values: dict[fx.Node, fx.Node] = {}
        result: object = None
        with draft.graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(given)
                elif inner.op == "output":
                    result = values[inner.args[0]]
                else:
                    values[inner] = draft.graph.node_copy(inner, values.__getitem__)
                    if inner.op in ("call_module", "get_attr"):
                        values[inner].target = f"{path}.{inner.target}"
        node.replace_all_uses_with(result)  # type: ignore[arg-type]
        draft.graph.erase_node(node)
        for read in traced.reads:
            moved = Read(_join(path, read.path), read.name, read.value)
            draft.reads[moved[:2]] = moved
        for container in traced.containers:
            moved_path = _join(path, container.path)
            draft.containers[moved_path] = Container(moved_path, container.names)
        draft.kinds[path] = Kind(path, type(module))
        draft.inlined.append(path)


def _offer_output(graph: fx.Graph, site: Site) -> None:
    """Lets the output of the place be made again in the backward."""
    call: Any = site.output if site.functional else site.output.args[0]
    if site.functional:
        own, residual, other, *_ = call.args
        input, residual = own[0], residual if other is None else other[0]
    else:
        _, input, residual, *_ = call.args
    with graph.inserting_after(site.output):
        graph.call_function(offer, (site.output, input, residual))


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is PyTorch's own code."""
    return type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
