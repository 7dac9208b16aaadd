"""Which modules of a model get which code: sites and pairs, from traces of every module's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from ..blocks import ForkedBlock
from ..norms import FUSED_NORMS, is_batch_norm, is_norm
from .drafting import Draft, Drafter, plans
from .fused_forward import FusedForward, Kind, Plan, forked_call
from .matching.nodes import is_plain_call, result_of
from .matching.sites import Matcher
from .pairs import call_for_pair, hand_on, open_ends, pair_call, readers
from .reading.signature import Call, call_of, plain_signature, with_tensors
from .reading.tracing import traceable
from .report import Fused
from .traces import Traces

Filter = Callable[[nn.Module, str], bool]
Key = tuple[nn.Module, str, bool]
"""A module, the signature of a call of it, and whether in training."""


class Planner:
    """Finds the sites of a model from the outermost module inwards, then the pairs from the innermost outwards.

    A model is called with tensors alone, its submodules as the code that calls them does.
    """

    def __init__(self, model: nn.Module, filter_fn: Filter | None, recompute: Filter | bool):
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.filter_fn = filter_fn
        self.recompute = recompute
        self.traces = Traces()
        self.drafter = Drafter(self.traces, self.allowed)
        self.calls: dict[nn.Module, dict[bool, dict[str, Call]]] = {}
        """By mode and signature."""
        self.drafts: dict[Key, Draft] = {}
        self.forked: set[nn.Module] = set()
        """The first norms of the tails whose output is handed on as a pair."""
        self._find_drafts()
        for key in reversed(self.drafts):
            self._pair(key)

    def _find_drafts(self) -> None:
        with_norms = {m for norm in self.names if is_batch_norm(norm) for m in (norm, *self.ancestors(norm))}
        inlined: set[nn.Module] = set()
        called: set[nn.Module] = set()
        for module in self.names:
            # Its own code may contain a site, or hand on a pair.
            candidate = module in with_norms and not is_norm(module) and has_code(module)
            if not candidate or (module in inlined and module not in called):
                continue
            for training in (True, False):
                for call in self.calls_of(module, training):
                    draft = self.drafter.draft(module, call, training)
                    if draft is None:
                        continue
                    self.drafts[module, call.signature, training] = draft
                    inlined |= {module.get_submodule(path) for path in draft.inlined}
                    called |= self._note_calls(module, draft, training)

    def calls_of(self, module: nn.Module, training: bool) -> list[Call]:
        """As the code around it calls it; where none does that could be traced, with tensors alone."""
        if module in self.calls:
            return list(self.calls[module].get(training, {}).values())
        alone = with_tensors(module)
        return [] if alone is None else [alone]

    def _note_calls(self, module: nn.Module, draft: Draft, training: bool) -> set[nn.Module]:
        """The submodules that the draft calls."""
        found = set()
        for node in draft.graph.nodes:
            if node.op == "call_module":
                child = module.get_submodule(str(node.target))
                found.add(child)
                call = call_of(child, node) if has_code(child) else None
                if call is not None:
                    self.calls.setdefault(child, {}).setdefault(training, {})[call.signature] = call
        return found

    def forwards(self) -> list[FusedForward]:
        found: dict[nn.Module, dict[str, list[Draft]]] = {}
        for (module, signature, _), draft in self.drafts.items():
            found.setdefault(module, {}).setdefault(signature, []).append(draft)
        forwards = [forward for module, drafts in found.items() if (forward := self._forward(module, drafts))]
        if any(forward.recomputed for forward in forwards) and all(f.module is not self.model for f in forwards):
            # What keeps an output may be called by any module's code: the model's own call is where it is seen.
            forwards.append(FusedForward(self.model, {}, (), *self._paths(self.model)))
        return forwards

    def _forward(self, module: nn.Module, drafts: dict[str, list[Draft]]) -> FusedForward | None:
        refused, recomputed = self._paths(module)
        by_call = {signature: plans(each, recomputed) for signature, each in drafts.items()}
        if not any(by_call.values()):
            return None
        sites = (site for each in drafts.values() for draft in reversed(each) for site in draft.sites)
        places = {site.norms[0]: str(site) for site in sites}
        return FusedForward(module, by_call, tuple(places.values()), refused, recomputed)

    def _paths(self, module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
        """Of the norms in it that are not to be fused, and of those whose outputs are to be made again."""
        if self.filter_fn is None and self.recompute is False:
            return frozenset(), frozenset()
        norms = [(path, m) for path, m in module.named_modules() if is_batch_norm(m)]
        refused = frozenset(path for path, m in norms if not self.allowed(m))
        return refused, frozenset(path for path, m in norms if self.recomputed(m))

    def fused(self) -> tuple[Fused, ...]:
        """Every place once, those of training first."""
        modes: dict[tuple[nn.Module, str, tuple[nn.Module, ...], bool], set[bool]] = {}
        for (module, _, training), draft in self.drafts.items():
            for site in draft.sites:
                norms = tuple(module.get_submodule(path) for path in site.norms)
                modes.setdefault((module, site.form, norms, site.frozen), set()).add(training)
        found = []
        for (module, form, norms, frozen), modes_of in modes.items():
            names = tuple(self.names[n] for n in norms)
            recomputed = all(map(self.recomputed, norms))
            forked = norms[0] in self.forked
            found.append(Fused(self.names[module], form, names, forked, *_in(modes_of), recomputed, frozen))
        return tuple(sorted(found, key=lambda entry: not entry.in_training))

    def allowed(self, norm: nn.Module) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(norm, self.names[norm]))

    def recomputed(self, norm: nn.Module) -> bool:
        return self.recompute if isinstance(self.recompute, bool) else bool(self.recompute(norm, self.names[norm]))

    def matcher(self, graph: fx.Graph, root: nn.Module) -> Matcher:
        """Of a graph in training."""
        return self.drafter.matcher(graph, root, True)

    def is_ours(self, norm: nn.Module) -> bool:
        return isinstance(norm, FUSED_NORMS) or any(isinstance(m, ForkedBlock) for m in self.ancestors(norm))

    def ancestors(self, module: nn.Module) -> Iterator[nn.Module]:
        """From the nearest outwards, to the model."""
        name = self.names[module]
        while name:
            name = name.rpartition(".")[0]
            yield self.model.get_submodule(name)

    def _pair(self, key: Key) -> None:
        """Hands the output of one block to the next as a pair, within the module and through its ends."""
        module, signature, training = key
        draft = self.drafts[key]
        graph = draft.graph
        inputs = graph.find_nodes(op="placeholder")
        (output,) = graph.find_nodes(op="output")
        for node in self._pair_calls(module, graph, output, training):
            call_for_pair(graph, node)
        calls = graph.find_nodes(op="call_function", target=forked_call)
        for call in calls:
            maker = self._maker(module, call.args[1], training)
            if maker is not None and len(call.args[1].users) == 1 and self._takes_pair(_called(module, call), training):
                hand_on(graph, maker, call)
                draft.hands_on = True
                self._note_maker(module, maker, training)
                self._note_taker(_called(module, call), training)
        if signature != plain_signature(module) or len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
            return
        draft.takes_pair, draft.readers = self._input_use(module, draft, inputs[0], training)
        maker = self._maker(module, output.args[0], training)
        draft.gives_pair = maker is not None and len(output.args[0].users) == 1
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

    def _plain_draft(self, module: nn.Module | None, training: bool) -> Draft | None:
        return None if module is None else self.drafts.get((module, plain_signature(module), training))

    def _takes_pair(self, module: nn.Module | None, training: bool) -> bool:
        draft = self._plain_draft(module, training)
        return isinstance(module, ForkedBlock) or (draft is not None and draft.takes_pair)

    def _gives_pair(self, module: nn.Module | None, training: bool) -> bool:
        draft = self._plain_draft(module, training)
        return isinstance(module, ForkedBlock) or (draft is not None and draft.gives_pair)

    def _input_use(self, module: nn.Module, draft: Draft, x: fx.Node, training: bool) -> tuple[bool, tuple[Kind, ...]]:
        """Whether the input may come as a pair, and the submodules that must stay as they are for it."""
        users = list(x.users)
        if len(users) == 1 and users[0].target is forked_call:
            return self._takes_pair(_called(module, users[0]), training), ()

        def inner(child: nn.Module, node: fx.Node) -> fx.Graph | None:
            return self.traces.graph(child, call_of(child, node), training)

        found = readers(draft.graph, module, x, inner) if len(users) > 1 else None
        return found is not None, tuple(Kind(path, type(module.get_submodule(path))) for path in found or ())

    def _note_maker(self, module: nn.Module, maker: fx.Node, training: bool) -> None:
        """Whose tail it is that makes the pair: of this module, or of the last that it calls."""
        while maker.target is forked_call:
            module = _called(module, maker)
            draft = self._plain_draft(module, training)
            if draft is None:
                return
            draft.hands_on = True
            maker = pair_call(result_of(draft.graph)[0])  # type: ignore[index,assignment]
        self.forked.add(_called(module, maker))

    def _note_taker(self, module: nn.Module, training: bool) -> None:
        """The modules that the pair goes through."""
        while (draft := self._plain_draft(module, training)) is not None:
            draft.hands_on = True
            x = draft.graph.find_nodes(op="placeholder")[0]
            if [user.target for user in x.users] != [forked_call]:
                return
            module = _called(module, next(iter(x.users)))


def _called(root: nn.Module, call: fx.Node) -> nn.Module:
    """The module that is the first argument of the call of a function."""
    return root.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]


def _in(modes: set[bool]) -> tuple[bool, bool]:
    return True in modes, False in modes


def has_code(module: nn.Module) -> bool:
    """Whether it has a forward: those that only hold others have none."""
    return type(module).forward is not nn.Module.forward


def plans_of(module: nn.Module, call: Call, refused: frozenset[str], recomputed: frozenset[str]) -> tuple[Plan, ...]:
    """Of a call that no ``Planner`` knew of; see ``FusedForward`` for the paths of norms."""

    def found() -> tuple[Plan, ...]:
        norms = {module.get_submodule(path) for path in refused}
        drafter = Drafter(Traces(), lambda norm: norm not in norms)
        drafts = (drafter.draft(module, call, training) for training in (True, False))
        return plans([draft for draft in drafts if draft is not None], recomputed)

    return traceable(module, found)
