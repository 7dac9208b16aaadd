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
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cached_property, partial
from itertools import chain, repeat
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .signature import Call, replaced

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

    reads: tuple[Read, ...] = ()
    """What the code had read by then."""


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


T = TypeVar("T")
# Before anything, torch.fx too, has patched them.
_call, _getattr, _setattr = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__
_apply = vars(torch.autograd.Function)["apply"]
_thread = threading.local()
"""``code``: what is being traced, in this thread; None elsewhere, where PyTorch is as it always is."""


def traceable(model: nn.Module, work: Callable[[], T]) -> T:
    """``work()``, which may call ``trace`` for modules of the model: for all of them PyTorch is patched once."""
    results: list[T] = []

    def patched() -> None:
        # torch.fx has patched the functions that it does not look into, and those of ``math``.
        with _patches(model):
            results.append(work())

    fx.Tracer().trace(patched)
    return results[0]


def trace(module: nn.Module, call: Call, training: bool) -> Trace:
    """The graph of ``type(module).forward`` where ``training`` is the value of every ``training`` that it reads.

    Its placeholders are the tensors of the call; other arguments are as they are there. Raises: UntraceableError.
    """
    code = _Code(module, training)
    state = random.getstate()
    _thread.code = code
    try:
        with _own_isinstance(inspect.unwrap(type(module).forward).__globals__), _OnValuesOnly():
            code.run(call)
    except UntraceableError as error:
        error.reads = tuple(code.reads.values())
        raise
    except Exception as error:
        message = str(error).partition("\n")[0]
        untraceable = UntraceableError(f"{type(error).__name__}: {message}"[:200])
        untraceable.reads = tuple(code.reads.values())
        raise untraceable from error
    finally:
        _thread.code = None
    if random.getstate() != state:
        random.setstate(state)
        raise UntraceableError("it draws random numbers")
    return Trace(code.graph, tuple(code.reads.values()), tuple(containers_of(module)))


def containers_of(module: nn.Module, path: str = "") -> Iterator[Container]:
    """Of the module and of what it holds its children in."""
    yield Container(path, tuple(module._modules))
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from containers_of(child, f"{path}.{name}" if path else name)


class _Proxy(fx.Proxy):
    """One whose ``x += y`` stays an addition in place, where torch.fx makes it ``x = x + y``."""


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Code(fx.Tracer):
    """One run of a forward. Every submodule is a leaf, every parameter and buffer a value; refuses writes."""

    def __init__(self, root: nn.Module, training: bool):
        super().__init__()
        self.root = root
        self.training = training
        self.graph = fx.Graph()
        self.paths = {id(m): name for name, m in root.named_modules()}
        self.values: dict[str, fx.Proxy] = {}
        self.reads: dict[tuple[str, str], Read] = {}

    @cached_property
    def tensor_attrs(self) -> dict[Any, str]:  # type: ignore[override]
        """What torch.fx asks for tensors that are neither parameters nor buffers."""
        found = {}
        for name, module in self.root.named_modules():
            for key, value in object.__getattribute__(module, "__dict__").items():
                if isinstance(value, Tensor):
                    found[value] = f"{name}.{key}" if name else key
        return found

    def run(self, call: Call) -> None:
        names = _names(type(self.root), call)
        args, kwargs = replaced((call.args, call.kwargs), lambda _: self.placeholder(next(names)))
        before = repr((args, kwargs))
        result = type(self.root).forward(self.root, *args, **kwargs)
        if repr((args, kwargs)) != before:
            raise UntraceableError("it changes a list or dict that it is given")
        if not _containers_in((args, kwargs)).isdisjoint(_containers_in(result)):
            raise UntraceableError("it returns a list or dict that it is given")
        self.create_node("output", "output", (self.create_arg(_returned(self, result)),), {})

    def placeholder(self, name: str) -> fx.Proxy:
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.node.target = proxy.node.name
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def child(self, module: nn.Module, args: Any, kwargs: Any) -> fx.Proxy:
        """The call of a submodule."""
        path = self.paths.get(id(module))
        if path is None:
            raise UntraceableError(f"it calls {a_type(module)} that is not inside it")
        return self.create_proxy("call_module", path, args, kwargs)

    def tensor(self, module: nn.Module, name: str) -> fx.Proxy:
        """A parameter or buffer."""
        path = self.paths.get(id(module))
        if path is None:
            raise UntraceableError(f"it reads {name} of a module that is not inside it")
        full = f"{path}.{name}" if path else name
        if full not in self.values:
            self.values[full] = self.create_proxy("get_attr", full, (), {})
        return self.values[full]

    def note(self, module: nn.Module, name: str, value: Any) -> None:
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


def _names(kind: type[nn.Module], call: Call) -> Iterator[str]:
    """Of the placeholders: those of the parameters; torch.fx numbers equal ones."""
    parameters = list(inspect.signature(kind.forward).parameters)[1:]
    for name, value in zip(chain(parameters, repeat("tensor")), (*call.args, *call.kwargs.values()), strict=False):
        tensors: list[Any] = []
        replaced(value, tensors.append)
        yield from repeat(name, len(tensors))


def _containers_in(value: Any) -> set[int]:
    """The lists and dicts, by identity."""
    if not isinstance(value, (list, tuple, dict)):
        return set()
    inside = value.values() if isinstance(value, dict) else value
    own = set() if isinstance(value, tuple) else {id(value)}
    return own.union(*map(_containers_in, inside))


def _returned(code: _Code, result: Any) -> Any:
    """torch.fx makes every dict a plain one."""
    if type(result) is OrderedDict:
        return code.create_proxy("call_function", OrderedDict, (list(result.items()),), {})
    if isinstance(result, dict) and type(result) is not dict:
        if not is_dataclass(result):
            raise UntraceableError(f"it returns {a_type(result)}")
        return code.create_proxy("call_function", type(result), (), dict(result))
    return result


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
def _own_isinstance(scope: dict[str, Any]) -> Iterator[None]:
    """In the namespace of the code that is traced: the builtin cannot be patched, and is not to be."""
    before = scope.get("isinstance", _thread)
    scope["isinstance"] = _is_instance
    try:
        yield
    finally:
        if before is _thread:
            del scope["isinstance"]
        else:
            scope["isinstance"] = before


_TENSOR = Tensor()


def _is_instance(value: Any, classes: Any) -> bool:
    """As the value will answer that the proxy stands for."""
    return isinstance(_TENSOR if isinstance(value, fx.Proxy) else value, classes)


def _tracing() -> _Code | None:
    return getattr(_thread, "code", None)


@contextmanager
def _patches(model: nn.Module) -> Iterator[None]:
    """What code that is traced calls and reads; code that torch.fx would take for something else is refused."""
    read = object.__getattribute__

    def refusing(what: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if _tracing() is None:
                return plain(*args, **kwargs)
            raise UntraceableError(f"it uses {what}")

        return refused

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        code = _tracing()
        return _call(module, *args, **kwargs) if code is None else code.child(module, args, kwargs)

    def own_call(plain: Callable[..., Any]) -> Callable[..., Any]:
        """What a class's own call does is done when the graph is run, not twice."""

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            code = _tracing()
            return plain(module, *args, **kwargs) if code is None else code.child(module, args, kwargs)

        return called

    def attribute(module: nn.Module, name: str) -> Any:
        value = read(module, name)
        code = _tracing()
        if code is None or name in _INTERNAL:
            return value
        if name == "training":
            value = code.training
        if name in read(module, "__dict__"):
            code.note(module, name, value)
        return value

    def registered(module: nn.Module, name: str) -> Any:
        value = _getattr(module, name)
        code = _tracing()
        if code is not None and value is None:
            code.note(module, name, None)
        return value if code is None or not isinstance(value, Tensor) else code.tensor(module, name)

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if _tracing() is None:
            return _setattr(module, name, value)
        raise UntraceableError(f"it assigns {name}")

    def is_tensor(value: Any) -> bool:
        return _is_instance(value, Tensor)

    @classmethod  # type: ignore[misc]
    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        return refusing("an autograd.Function", _apply.__get__(None, kind))(*args, **kwargs)

    hooks = torch.autograd.graph.saved_tensors_hooks
    with ExitStack() as stack:
        for kind in {type(child) for child in model.modules()}:
            if kind.__call__ is not nn.Module.__call__:
                stack.enter_context(mock.patch.object(kind, "__call__", own_call(kind.__call__)))
        for place, name, function in (
            (nn.Module, "__call__", call),
            (nn.Module, "__getattr__", registered),
            (nn.Module, "__setattr__", assign),
            (torch, "is_tensor", is_tensor),
            *((torch, name, refusing(f"torch.{name}", getattr(torch, name))) for name in _GLOBAL_STATE),
            (torch.autograd.Function, "apply", apply),
            (hooks, "__enter__", refusing("saved-tensor hooks, or checkpointing", hooks.__enter__)),
            (nn.Module, "__getattribute__", attribute),
        ):
            stack.enter_context(mock.patch.object(place, name, function))
        yield


def a_type(value: object) -> str:
    """The name of its class, with the article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"
