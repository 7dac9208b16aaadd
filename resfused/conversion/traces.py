"""The traces of a model's modules, each class's code traced once for all of its modules that are alike to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .fused_forward import ATTRIBUTES, FusedForward, at, is_same
from .matching.frozen_norms import call_frozen_norms
from .reading.signature import Call
from .reading.tracing import Trace, UntraceableError, trace

Found = Trace | UntraceableError


class Traces:
    """By module, call and mode."""

    def __init__(self) -> None:
        self._of_modules: dict[tuple[nn.Module, str, bool], Found] = {}
        self._of_code: dict[tuple[Any, ...], list[Found]] = {}

    def of(self, module: nn.Module, call: Call, training: bool) -> Trace:
        """Raises: UntraceableError."""
        key = module, call.signature, training
        if key not in self._of_modules:
            self._of_modules[key] = self._found(module, call, training)
        found = self._of_modules[key]
        if isinstance(found, UntraceableError):
            raise found
        return found

    def graph(self, module: nn.Module, call: Call | None, training: bool) -> fx.Graph | None:
        """None where it cannot be traced."""
        try:
            return None if call is None else self.of(module, call, training).graph
        except UntraceableError:
            return None

    def _found(self, module: nn.Module, call: Call, training: bool) -> Found:
        alike = self._of_code.setdefault((type(module), _shape(module), call.signature, training), [])
        for found in alike:
            if all(_reads_the_same(module, *read) for read in found.reads):
                return found
        try:
            found = _trace(module, call, training)
        except UntraceableError as error:
            found = error
        alike.append(found)
        return found


def _reads_the_same(module: nn.Module, path: str, name: str, value: Any) -> bool:
    # Both modes are traced as if all were in them.
    return name == "training" or is_same(getattr(at(module, path), name, at), value)


def _shape(module: nn.Module) -> tuple[Any, ...]:
    """What code may ask of a module besides values: what it has, and of which classes that is."""
    own = vars(module)
    return (
        tuple(name for name in own if name not in ATTRIBUTES),
        "forward" in own,
        *(tuple((name, value is None) for name, value in own[kind].items()) for kind in ("_parameters", "_buffers")),
        tuple(_children(module)),
    )


def _children(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, child in vars(module)["_modules"].items():
        nested = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        yield (name, type(child), *(_children(child) if nested else ()))


def _trace(module: nn.Module, call: Call, training: bool) -> Trace:
    """``trace`` of the code that fuse_ may replace."""
    if isinstance(module, fx.GraphModule):
        raise UntraceableError("it is a GraphModule, whose code is generated")
    if isinstance(module, torch.jit.ScriptModule):
        raise UntraceableError("it is compiled by TorchScript")
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], FusedForward):
        raise UntraceableError("it has a forward of its own in place of its class's")
    found = trace(module, call, training)
    call_frozen_norms(found.graph)
    return found
