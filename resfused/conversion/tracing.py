"""What one module's own code computes, as a torch.fx graph whose calls are those of its submodules.

torch.fx takes every value that is not a tensor for a constant. So here each constant that the code read is kept with
the graph, to be compared before the graph is used, and code whose graph could not be trusted is refused.
"""

from __future__ import annotations

import copy
import enum
import inspect
import operator
import random
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_INTERNAL = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
_CONSTANTS = (
    bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, enum.Enum, type,
    types.FunctionType, types.BuiltinFunctionType, partial,
)  # fmt: skip
_GLOBAL_STATE = (
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_rng_state", "is_autocast_cpu_enabled"
)  # fmt: skip


class UntraceableError(Exception):
    """The module's code cannot be traced, or its graph could not be trusted; says why."""


class Read(NamedTuple):
    """An attribute that the code read, a constant of the graph: the value of ``name`` in the submodule ``path``."""

    path: str
    name: str
    value: Any


class Container(NamedTuple):
    """The names of the children that the submodule ``path`` had."""

    path: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """The graph of a module's forward, and what it takes for granted."""

    graph: fx.Graph
    reads: tuple[Read, ...]
    containers: tuple[Container, ...]


def trace(module: nn.Module, training: bool) -> Trace:
    """The graph of ``type(module).forward`` where ``training`` is the value of every ``training`` that it reads.

    Arguments that have a default keep it. Raises: UntraceableError.
    """
    tracer = _Tracer()
    recorder = _Recorder(module, training)
    state = random.getstate()
    try:
        with _careful(module), recorder.recording():
            graph = tracer.trace(module)
    except UntraceableError:
        raise
    except Exception as error:
        message = str(error).partition("\n")[0]
        raise UntraceableError(f"{type(error).__name__}: {message}"[:200]) from error
    if random.getstate() != state:
        random.setstate(state)
        raise UntraceableError("it draws random numbers")
    return Trace(graph, tuple(recorder.reads.values()), tuple(_containers(module)))


def _containers(module: nn.Module, path: str = "") -> Iterator[Container]:
    """Of the module and of what it holds its children in."""
    yield Container(path, tuple(module._modules))
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _containers(child, f"{path}.{name}" if path else name)


class _Proxy(fx.Proxy):
    """One whose ``x += y`` stays an addition in place, where torch.fx makes it ``x = x + y``."""


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    """Every submodule is a leaf, every parameter and buffer a value."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """A placeholder for each argument without a default."""
        args: list[Any] = [self.root]
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.default is not (
                parameter.empty
            ):
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise UntraceableError(f"its argument {name} can only be given by name")
            args.append(self.create_proxy("placeholder", name, (), {}))
        return root_fn, args


class _Recorder:
    """Notes what is read from the module and its submodules, and refuses writes."""

    def __init__(self, root: nn.Module, training: bool):
        self.paths = {id(m): name for name, m in root.named_modules()}
        self.training = training
        self.reads: dict[tuple[str, str], Read] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        plain = nn.Module.__getattr__

        def attribute(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name == "training":
                value = self.training
            if name not in _INTERNAL and name in object.__getattribute__(module, "__dict__"):
                self._note(module, name, value)
            return value

        def registered(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            if value is None:
                self._note(module, name, None)
            return value

        def assign(module: nn.Module, name: str, value: Any) -> None:
            raise UntraceableError(f"it assigns {name}")

        with (
            mock.patch.object(nn.Module, "__getattribute__", attribute),
            mock.patch.object(fx._symbolic_trace, "_orig_module_getattr", registered),
            mock.patch.object(nn.Module, "__setattr__", assign),
        ):
            yield

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        # A tensor, or a module, is looked up each time the graph is run.
        if isinstance(value, (Tensor, nn.Module)):
            return
        path = self.paths.get(id(module))
        if path is None:
            raise UntraceableError(f"it reads {name} of a module that is not inside it")
        if (path, name) not in self.reads:
            if not _is_constant(value):
                raise UntraceableError(f"it reads {name}, {a_type(value)}, which may change")
            self.reads[path, name] = Read(path, name, copy.deepcopy(value))


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, [*value, *value.values()]))
    return value is None or isinstance(value, _CONSTANTS)


class _OnValuesOnly(TorchFunctionMode):
    """Refuses what would run while it is traced, and what torch.fx would leave out of the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(value, fx.Proxy) for value in pytree.tree_leaves((args, kwargs))):
            raise UntraceableError(f"it calls {getattr(func, '__name__', func)}, which does not depend on its input")
        return func(*args, **kwargs)


@contextmanager
def _careful(module: nn.Module) -> Iterator[None]:
    """Where code that torch.fx would take for something else is refused."""

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise UntraceableError(f"it uses {what}")

        return refused

    def is_instance(value: Any, classes: Any) -> bool:
        """As the value will answer that the proxy stands for."""
        return isinstance(Tensor() if isinstance(value, fx.Proxy) else value, classes)

    def leaf_call(child: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a class's own call does is done when the graph is run, not twice."""
        return nn.Module.__call__(child, *args, **kwargs)

    forward = inspect.unwrap(type(module).forward)
    with ExitStack() as stack:
        for kind in {type(child) for child in module.modules()}:
            if kind.__call__ is not nn.Module.__call__:
                stack.enter_context(mock.patch.object(kind, "__call__", leaf_call))
        stack.enter_context(mock.patch.dict(forward.__globals__, {"isinstance": is_instance}))
        stack.enter_context(mock.patch.object(torch, "is_tensor", lambda value: is_instance(value, Tensor)))
        for name in _GLOBAL_STATE:
            stack.enter_context(mock.patch.object(torch, name, refuse(f"torch.{name}")))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", refuse("an autograd.Function")))
        hooks = torch.autograd.graph.saved_tensors_hooks
        stack.enter_context(mock.patch.object(hooks, "__enter__", refuse("saved-tensor hooks, or checkpointing")))
        stack.enter_context(_OnValuesOnly())
        yield


def a_type(value: object) -> str:
    """The name of its class, with the article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"
