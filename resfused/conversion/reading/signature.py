"""How a module is called: which arguments are tensors, and the values of those that are not, which its code may ask."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

_MISSING = inspect.Parameter.empty
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format, torch.Size)
_LISTS = (list, tuple)
_DICTS = (dict, OrderedDict)


class Call(NamedTuple):
    """The arguments of one call, defaults filled in. Tensors are any; in a graph, its nodes stand for them."""

    signature: str
    """Equal for calls that differ in their tensors alone."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Of parameters that can only be given by name, and of ``**kwargs``."""
    tensors: tuple[Any, ...]


class Parameters(NamedTuple):
    """Of the forward of a class."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    """One for each name; ``_MISSING`` where there is none."""
    named: dict[str, Any]
    """Those that can only be given by name, with their defaults."""
    more: bool
    """Whether it takes ``*args``."""
    more_named: bool
    """Whether it takes ``**kwargs``."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """None where an argument is something else than tensors, constants, and lists and dicts of them; or missing."""
        if len(args) > len(self.names) and not self.more:
            return None
        given = dict(kwargs)
        values = list(args)
        for i in range(len(args), len(self.names)):
            values.append(given.pop(self.names[i], self.defaults[i]))
        if not self.more_named and any(name not in self.named for name in given):
            return None
        named = {**self.named, **given}
        tensors: list[Any] = []
        texts = [_text(value, tensors) for value in values]
        texts += [_named(name, _text(value, tensors)) for name, value in named.items()]
        if None in texts:
            return None
        return Call(", ".join(texts), tuple(values), named, tuple(tensors))  # type: ignore[arg-type]


def parameters(module: nn.Module) -> Parameters:
    """Of the forward of its class."""
    return _parameters(type(module))  # type: ignore[arg-type]


@cache
def _parameters(kind: Any) -> Parameters:
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    kinds = {p.kind for p in found}
    return Parameters(
        tuple(p.name for p in positional),
        tuple(p.default for p in positional),
        {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY},
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


def with_tensors(module: nn.Module) -> Call | None:
    """The call with a tensor for every argument that must be given."""
    return _with_tensors(type(module))  # type: ignore[arg-type]


@cache
def _with_tensors(kind: Any) -> Call | None:
    names, defaults, named, more, _ = found = _parameters(kind)
    graph = fx.Graph()
    args = [graph.placeholder(n) if d is _MISSING else d for n, d in zip(names, defaults, strict=True)]
    if more and not args:
        args = [graph.placeholder("x")]
    return found.call(tuple(args), {n: graph.placeholder(n) for n, d in named.items() if d is _MISSING})


def plain_call(module: nn.Module) -> Call | None:
    """The call with one tensor and nothing else."""
    return _plain_call(type(module))  # type: ignore[arg-type]


@cache
def _plain_call(kind: Any) -> Call | None:
    return _parameters(kind).call((fx.Graph().placeholder("x"),), {})


def plain_signature(module: nn.Module) -> str:
    """Of ``plain_call``; empty where there is no such call."""
    call = plain_call(module)
    return "" if call is None else call.signature


def call_of(module: nn.Module, node: fx.Node) -> Call | None:
    """The call that a node of a graph makes."""
    return parameters(module).call(node.args, node.kwargs)


def is_value(x: Any) -> bool:
    """Whether it is a tensor, or stands for one in a graph."""
    return isinstance(x, (Tensor, fx.Node))


def replaced(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same lists and dicts, of ``function`` of each tensor; values of other kinds are kept."""
    if is_value(value):
        return function(value)
    if isinstance(value, list):
        return [replaced(each, function) for each in value]
    if type(value) in _LISTS:
        return tuple(replaced(each, function) for each in value)
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, replaced(each, function)) for key, each in value.items())
    return value


def _text(value: Any, tensors: list[Any]) -> str | None:
    """ "Tensor", or what Python would write; notes the tensors. None for a value that cannot be told from others so."""
    if is_value(value):
        tensors.append(value)
        return "Tensor"
    kind = type(value)
    if kind in _CONSTANTS:
        return repr(value)
    # Of a graph lists and dicts are of torch.fx's own classes, which cannot be changed.
    if kind in _LISTS or isinstance(value, fx.immutable_collections.immutable_list):
        parts = [_text(each, tensors) for each in value]
        if None in parts:
            return None
        inside = ", ".join(parts)  # type: ignore[arg-type]
        return f"({inside})" if kind is tuple else f"[{inside}]"
    if kind in _DICTS or isinstance(value, fx.immutable_collections.immutable_dict):
        parts = [
            _named(key, _text(each, tensors)) if isinstance(key, (str, int)) else None for key, each in value.items()
        ]
        if None in parts:
            return None
        name = "OrderedDict" if kind is OrderedDict else ""
        return f"{name}{{{', '.join(parts)}}}"  # type: ignore[arg-type]
    return None


def _named(name: Any, text: str | None) -> str | None:
    return None if text is None else f"{name!r}: {text}"
