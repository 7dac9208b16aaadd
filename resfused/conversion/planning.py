"""Which modules of a model get which code: sites and pairs, from traces of every module's own forward."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import ForkedBlock
from ..norms import FUSED_NORMS, is_watched
from .fused_forward import FusedForward, Kind, Plan, forked_call
from .matching import Matcher, Site, is_called_once, is_fresh, is_identity, is_norm, is_plain_call, result_of
from .pairs import call_for_pair, hand_on, open_ends, pair_call, readers
from .report import Fused
from .tracing import Container, Read, Trace, UntraceableError, trace

Filter = Callable[[nn.Module, str], bool]


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

    def plan(self) -> Plan:
        code = self.graph.python_code("self")
        inputs = tuple(str(node.target) for node in self.graph.nodes if node.op == "placeholder")
        paired = self.takes_pair or self.gives_pair
        return Plan(
            code.src, code.globals, inputs[:1] if paired else inputs, paired, self.takes_pair,
            tuple(self.reads.values()), tuple(self.containers.values()), tuple(self.kinds.values()),
            tuple(path for site in self.sites if not site.functional for path in site.norms), self.readers,
        )  # fmt: skip


class Planner:
    """Finds the sites of a model from the outermost module inwards, then the pairs from the innermost outwards."""

    def __init__(self, model: nn.Module, filter_fn: Filter | None):
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.filter_fn = filter_fn
        self.traces: dict[tuple[nn.Module, bool], Trace | UntraceableError] = {}
        self.drafts: dict[tuple[nn.Module, bool], Draft] = {}
        self.forked: set[nn.Module] = set()
        """The first norms of the tails whose output is handed on as a pair."""
        covered: set[nn.Module] = set()
        for module in self.names:
            if module not in covered and self._is_candidate(module):
                for training in (True, False):
                    draft = self._draft(module, training)
                    if draft is not None:
                        self.drafts[module, training] = draft
                        covered |= {module.get_submodule(path) for path in draft.inlined}
        for module, training in reversed(self.drafts):
            self._pair(module, training)

    def forwards(self) -> list[FusedForward]:
        found = []
        for module in self.names:
            drafts = [self.drafts[module, mode] for mode in (True, False) if (module, mode) in self.drafts]
            if not any(name == "training" for draft in drafts for _, name in draft.reads):
                drafts = drafts[:1]
            plans = tuple(draft.plan() for draft in drafts if draft.sites or draft.hands_on)
            if plans:
                places = {site.norms[0]: str(site) for draft in reversed(drafts) for site in draft.sites}
                found.append(FusedForward(module, plans, tuple(places.values())))
        return found

    def fused(self) -> tuple[Fused, ...]:
        """Every site once: as it is in training, or else in evaluation."""
        found: dict[nn.Module, Fused] = {}
        for (module, training), draft in self.drafts.items():
            for site in draft.sites:
                norms = tuple(module.get_submodule(path) for path in site.norms)
                names = tuple(self.names[norm] for norm in norms)
                entry = Fused(self.names[module], site.form, names, norms[0] in self.forked, training)
                found.setdefault(norms[0], entry)
        return tuple(found.values())

    def allowed(self, norm: nn.Module) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(norm, self.names[norm]))

    def is_ours(self, norm: nn.Module) -> bool:
        return isinstance(norm, FUSED_NORMS) or any(isinstance(m, ForkedBlock) for m in self.ancestors(norm))

    def ancestors(self, module: nn.Module) -> Iterator[nn.Module]:
        """From the nearest outwards, to the model."""
        name = self.names[module]
        while name:
            name = name.rpartition(".")[0]
            yield self.model.get_submodule(name)

    def _is_candidate(self, module: nn.Module) -> bool:
        """Whether its own code may contain a site, or hand on a pair."""
        if is_norm(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return False
        return any(isinstance(m, _BatchNorm) for m in module.modules())

    def trace(self, module: nn.Module, training: bool) -> Trace:
        key = module, training
        if key not in self.traces:
            try:
                self.traces[key] = _trace(module, training)
            except UntraceableError as error:
                self.traces[key] = error
        found = self.traces[key]
        if isinstance(found, UntraceableError):
            raise found
        return found

    def _graph(self, module: nn.Module, training: bool) -> fx.Graph | None:
        """None where it cannot be traced."""
        try:
            return self.trace(module, training).graph
        except UntraceableError:
            return None

    def _draft(self, module: nn.Module, training: bool) -> Draft | None:
        try:
            traced = self.trace(module, training)
        except UntraceableError:
            return None
        graph = copy.deepcopy(traced.graph)
        draft = Draft(graph, {r[:2]: r for r in traced.reads}, {c.path: c for c in traced.containers})
        matcher = Matcher(draft.graph, module, self.allowed, partial(self._gives_fresh, training=training))
        while (node := self._to_inline(matcher, training)) is not None:
            self._inline(draft, node, module.get_submodule(str(node.target)), training)
        draft.sites = matcher.fuse()
        for path in (*(path for site in draft.sites for path in site.skipped), *sorted(matcher.relied_on)):
            draft.kinds[path] = Kind(path, type(module.get_submodule(path)))
        return draft

    def _gives_fresh(self, module: nn.Module, training: bool) -> bool:
        """Whether its output is a product, or another tensor of its own: attention scales a branch so."""
        if is_fresh(module):
            return True
        graph = self._graph(module, training)
        result = None if graph is None else result_of(graph)
        return isinstance(result, fx.Node) and result.target in (operator.mul, torch.mul) and len(result.users) == 1

    def _to_inline(self, matcher: Matcher, training: bool) -> fx.Node | None:
        """A call of a module whose code has the norm, the identity or the ReLU of a site."""
        for node in matcher.graph.nodes:
            module = matcher.module(node)
            if module is None or is_norm(module) or not self._can_inline(matcher, node, module):
                continue
            source = node.args[0]
            if self._computes_only(module, "relu", training) and self._ends_a_site(matcher, source, training):
                return node
            wanted = self._ends_in_norm(module, training) or (
                self._computes_only(module, "identity", training) and self._ends_a_site(matcher, source, training)
            )
            if wanted and self._reaches_relu(matcher, node, training):
                return node
        return None

    def _can_inline(self, matcher: Matcher, node: fx.Node, module: nn.Module) -> bool:
        if not is_plain_call(node) or is_watched(module) or _is_leaf(module):
            return False
        return is_called_once(matcher.graph, str(node.target))

    def _computes_only(self, module: nn.Module, what: str, training: bool) -> bool:
        """Whether it is a ReLU, or nothing, written as a module of its own."""
        graph = self._graph(module, training)
        if graph is None or len(graph.find_nodes(op="placeholder")) != 1:
            return False
        matcher = Matcher(graph, module, self.allowed)
        body = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        relus = [n for n in body if matcher.is_relu(n)]
        if len(body) != len(relus):
            return False
        result = result_of(graph)
        if what == "identity":
            return not relus and isinstance(result, fx.Node) and result.op == "placeholder"
        return len(relus) == 1 and result is relus[0]

    def _ends_in_norm(self, module: nn.Module, training: bool) -> bool:
        graph = self._graph(module, training)
        if graph is None:
            return False
        matcher = Matcher(graph, module, self.allowed)
        node, _ = matcher.peel(result_of(graph))
        return self._is_norm_or_ends_so(matcher, node, training)

    def _is_norm_or_ends_so(self, matcher: Matcher, node: object, training: bool) -> bool:
        if matcher.is_norm_call(node):
            return True
        module = matcher.module(node)
        if module is None or not self._can_inline(matcher, node, module):  # type: ignore[arg-type]
            return False
        return self._ends_in_norm(module, training)

    def _ends_a_site(self, matcher: Matcher, node: object, training: bool) -> bool:
        """Whether a ReLU there would be of a norm, or of a sum with one."""
        node, _ = matcher.peel(node)
        candidates = matcher.addends(node) or (node,)
        return any(self._is_norm_or_ends_so(matcher, matcher.peel(c)[0], training) for c in candidates)

    def _reaches_relu(self, matcher: Matcher, node: fx.Node, training: bool) -> bool:
        """Whether the only use of the value is a ReLU, after identities and one addition at most."""
        added = False
        while len(node.users) == 1:
            (user,) = node.users
            module = matcher.module(user)
            if matcher.is_relu(user):
                return True
            if module is not None and self._can_inline(matcher, user, module):
                if self._computes_only(module, "relu", training):
                    return True
                if not self._computes_only(module, "identity", training):
                    return False
            elif matcher.addends(user) is not None and not added:
                added = True
            elif not is_identity(module):
                return False
            node = user
        return False

    def _inline(self, draft: Draft, node: fx.Node, module: nn.Module, training: bool) -> None:
        """The graph of the module that ``node`` calls in its place."""
        path = str(node.target)
        traced = self.trace(module, training)
        values: dict[fx.Node, fx.Node] = {}
        result: object = None
        with draft.graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "placeholder":
                    values[inner] = node.args[0]  # type: ignore[assignment]
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

    def _pair(self, module: nn.Module, training: bool) -> None:
        """Hands the output of one block to the next as a pair, within the module and through its ends."""
        draft = self.drafts[module, training]
        graph = draft.graph
        inputs = graph.find_nodes(op="placeholder")
        (output,) = graph.find_nodes(op="output")
        if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
            return
        for node in self._pair_calls(module, graph, output, training):
            call_for_pair(graph, node)
        calls = graph.find_nodes(op="call_function", target=forked_call)
        for call in calls:
            maker = self._maker(module, call.args[1], training)
            if maker is not None and len(call.args[1].users) == 1 and self._takes_pair(_called(module, call), training):
                hand_on(graph, maker, call)
                self._note_forked(module, maker, training)
                draft.hands_on = True
        draft.takes_pair, draft.readers = self._input_use(module, draft, inputs[0], training)
        maker = self._maker(module, output.args[0], training)
        draft.gives_pair = maker is not None and len(output.args[0].users) == 1
        draft.hands_on |= bool(calls) and (draft.takes_pair or draft.gives_pair)
        if draft.takes_pair or draft.gives_pair:
            open_ends(graph, inputs[0], output, maker if draft.gives_pair else None, draft.takes_pair)

    def _pair_calls(self, module: nn.Module, graph: fx.Graph, output: fx.Node, training: bool) -> list[fx.Node]:
        """The calls of modules that take a pair, of those that can give them one, and of one that gives the output."""

        def child(node: object) -> nn.Module | None:
            plain = isinstance(node, fx.Node) and node.op == "call_module" and is_plain_call(node)
            return module.get_submodule(str(node.target)) if plain else None  # type: ignore[attr-defined]

        takers = [node for node in graph.nodes if self._takes_pair(child(node), training)]
        givers = [node.args[0] for node in (*takers, output) if self._gives_pair(child(node.args[0]), training)]
        return list(dict.fromkeys([*takers, *givers]))

    def _maker(self, module: nn.Module, value: object, training: bool) -> fx.Node | None:
        """The call that gives the value, and would give it as a pair."""
        call = pair_call(value)
        if call is None or call.target is not forked_call:
            return call
        return call if self._gives_pair(_called(module, call), training) else None

    def _takes_pair(self, module: nn.Module | None, training: bool) -> bool:
        draft = self.drafts.get((module, training)) if module is not None else None
        return isinstance(module, ForkedBlock) or (draft is not None and draft.takes_pair)

    def _gives_pair(self, module: nn.Module | None, training: bool) -> bool:
        draft = self.drafts.get((module, training)) if module is not None else None
        return isinstance(module, ForkedBlock) or (draft is not None and draft.gives_pair)

    def _input_use(self, module: nn.Module, draft: Draft, x: fx.Node, training: bool) -> tuple[bool, tuple[Kind, ...]]:
        """Whether the input may come as a pair, and the submodules that must stay as they are for it."""
        users = list(x.users)
        if len(users) == 1 and users[0].target is forked_call:
            return self._takes_pair(_called(module, users[0]), training), ()
        inner = {m: t.graph for (m, mode), t in self.traces.items() if mode == training and isinstance(t, Trace)}
        found = readers(draft.graph, module, x, inner) if len(users) > 1 else None
        return found is not None, tuple(Kind(path, type(module.get_submodule(path))) for path in found or ())

    def _note_forked(self, module: nn.Module, maker: fx.Node, training: bool) -> None:
        """Whose tail it is that makes the pair: of this module, or of the last that it calls."""
        while maker.target is forked_call:
            module = _called(module, maker)
            draft = self.drafts.get((module, training))
            if draft is None:
                return
            maker = pair_call(result_of(draft.graph)[0])  # type: ignore[index,assignment]
        self.forked.add(_called(module, maker))


def _called(root: nn.Module, call: fx.Node) -> nn.Module:
    """The module that is the first argument of the call of a function."""
    return root.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is PyTorch's own code."""
    return type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _trace(module: nn.Module, training: bool) -> Trace:
    """``trace`` of the code that fuse_ may replace."""
    if isinstance(module, fx.GraphModule):
        raise UntraceableError("it is a GraphModule, whose code is generated")
    if isinstance(module, torch.jit.ScriptModule):
        raise UntraceableError("it is compiled by TorchScript")
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], FusedForward):
        raise UntraceableError("it has a forward of its own in place of its class's")
    return trace(module, training)
