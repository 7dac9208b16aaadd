"""Why ``fuse_`` left a BatchNorm as it is, in words."""

from __future__ import annotations

from torch import nn

from ..norms import is_batch_norm, is_norm, is_watched
from .matching.nodes import calls_of
from .matching.reader import NORM_FUNCTIONS
from .planning import Planner, has_code
from .reading.tracing import UntraceableError, a_type
from .report import Fused, Left


def left(planner: Planner, fused: tuple[Fused, ...]) -> tuple[Left, ...]:
    """Every BatchNorm that is in no place fused in training, nor in a block or norm of resfused's own."""
    done = {name for entry in fused if entry.in_training for name in entry.norms}
    evaluated = {name for entry in fused for name in entry.norms} - done
    found = []
    for module, name in planner.names.items():
        if is_batch_norm(module) and name not in done and not planner.is_ours(module):
            reason = _reason(planner, module)
            found.append(Left(name, f"fused in evaluation only: {reason}" if name in evaluated else reason))
    return tuple(found)


def _reason(planner: Planner, norm: nn.Module) -> str:
    if not planner.allowed(norm):
        return "filter_fn refuses it"
    if isinstance(norm, nn.modules.batchnorm._LazyNormBase):
        return "it is lazy: run the model once before"
    if is_watched(norm):
        return "a hook is on it"
    if not is_norm(norm):
        return _inside(planner, norm)
    return _use(planner, norm)


def _inside(planner: Planner, norm: nn.Module) -> str:
    """Of a subclass with a forward of its own."""
    for call in planner.calls_of(norm, True):
        try:
            graph = planner.traces.of(norm, call, True).graph
        except UntraceableError as error:
            return f"the forward of its class {type(norm).__name__} cannot be traced: {error}"
        if not any(graph.find_nodes(op="call_function", target=function) for function in NORM_FUNCTIONS):
            return f"the forward of its class {type(norm).__name__} has neither F.batch_norm nor a known frozen norm"
    return f"its class {type(norm).__name__} is called with something else than tensors"


def _use(planner: Planner, module: nn.Module) -> str:
    """What keeps the code that calls it from being another."""
    for ancestor in planner.ancestors(module):
        path = planner.names[module].removeprefix(planner.names[ancestor]).lstrip(".")
        if not has_code(ancestor):
            continue
        for call in planner.calls_of(ancestor, True):
            try:
                graph = planner.traces.of(ancestor, call, True).graph
            except UntraceableError as error:
                return f"{_named(planner, ancestor)} cannot be traced: {error}"
            if any(calls_of(graph, path)):
                return f"{_named(planner, ancestor)} calls it with something else than one tensor, given by position"
    return "no code that could be traced calls it"


def _named(planner: Planner, module: nn.Module) -> str:
    name = planner.names[module]
    return f"{name}, {a_type(module)}," if name else f"the model, {a_type(module)},"
