"""The forward that ``fuse_`` gives a module: generated code where all that it takes for granted holds, else its own."""

from __future__ import annotations

import builtins
import inspect
import linecache
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import count
from pkgutil import resolve_name
from types import CodeType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx.node import _get_qualified_name
from torch.nn.modules.module import _has_any_global_hook

from ..blocks import ForkedBlock, takes_pairs
from ..norms import is_norm, is_watched
from ..recomputation import recomputing
from .reading.signature import Call, parameters, plain_signature
from .reading.tracing import Container, Read

_numbers = count()
MOST_CALLS = 16
"""That one module is planned for: a number that changes from call to call is no reason to go on."""


class Kind(NamedTuple):
    """The class that the submodule ``path`` must be of, and without hooks."""

    path: str
    type: type[nn.Module]


@dataclass(frozen=True)
class Plan:
    """Code for one module's forward, and what must hold for it.

    With ``paired`` the code is ``forward(self, x, shortcut, forked)`` and returns a pair, see ``ForkedBlock``.
    """

    source: str
    names: dict[str, Any]
    paired: bool
    takes_pair: bool
    reads: tuple[Read, ...]
    containers: tuple[Container, ...]
    kinds: tuple[Kind, ...]
    """Of submodules whose call was left out, or that had to be of a known class."""
    norms: tuple[str, ...]
    readers: tuple[Kind, ...]
    """Of submodules that are given the input: a hook there would see one half of a pair, a change in place both."""
    run: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", _compiled(self.source, self.names))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        state = (
            self.source, {name: _reference(value) for name, value in self.names.items()}, self.paired,
            self.takes_pair, self.reads, self.containers, self.kinds, self.norms, self.readers,
        )  # fmt: skip
        return _restored, state

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still what the code was generated for."""
        return self.change(module) is None

    def change(self, module: nn.Module) -> tuple[str, str] | None:
        """What is not as it was any more: of which submodule, and what."""
        for path, name, value in self.reads:
            if not is_same(getattr(at(module, path), name, _MISSING), value):
                return path, f"its {name} is another"
        for path, names in self.containers:
            container = at(module, path)
            if container is None or tuple(container._modules) != names:
                return path, "it has other children"
        for kind in self.kinds:
            if not is_still(module, kind):
                return kind.path, "it is of another class, or a hook is on it"
        for path in self.norms:
            norm = at(module, path)
            if norm is None or not is_norm(norm) or is_watched(norm):
                return path, "it is no BatchNorm of PyTorch's any more, or a hook is on it"
        return None


_MISSING = object()
_CONTAINERS = (list, tuple, set, frozenset, dict)


def is_same(found: Any, value: Any) -> bool:
    if type(found) is not type(value):
        return False
    if isinstance(value, partial):
        return (found.func, found.args, found.keywords) == (value.func, value.args, value.keywords)
    # Equal too: [True] and [1], which are not the same to the code.
    return bool(found == value) and (not isinstance(value, _CONTAINERS) or repr(found) == repr(value))


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule ``path``; None where there is none any more."""
    found: nn.Module | None = module
    if path:
        for name in path.split("."):
            if found is None:
                return None
            found = found._modules.get(name)
    return found


def is_still(module: nn.Module, kind: Kind) -> bool:
    found = at(module, kind.path)
    return found is not None and type(found) is kind.type and not is_watched(found)


ATTRIBUTES = ("forward", "_replicate_for_data_parallel", "extra_repr")


class FusedForward:
    """``module.forward`` of a fused module. It is copied and pickled with the module."""

    def __init__(
        self,
        module: nn.Module,
        plans: dict[str, tuple[Plan, ...]],
        places: tuple[str, ...],
        refused: frozenset[str] = frozenset(),
        recomputed: frozenset[str] = frozenset(),
    ):
        self.module = module
        self.parameters = parameters(module)
        self.plain = plain_signature(module)
        self.plans = plans
        """By the signature of the call."""
        self.places = places
        """Of each: its form, and in brackets its norms."""
        self.refused = refused
        """The paths of the norms that are not to be fused."""
        self.recomputed = recomputed
        """The paths of the norms of whose places the output is made again in the backward."""

    def put_on(self) -> None:
        """Not as parameters, buffers or submodules: they lie in the instance's dictionary, over the class's methods."""
        for name, function in zip(ATTRIBUTES, (self, self.replica, self.extra_repr), strict=True):
            object.__setattr__(self.module, name, function)

    def take_off(self) -> None:
        for name in ATTRIBUTES:
            # A forward that others have put over this one stays, and what it calls is the class's own.
            if name != "forward" or self.module.__dict__.get(name) is self:
                object.__delattr__(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_looked_into():
            return type(self.module).forward(self.module, *args, **kwargs)
        if not self.recomputed:
            return self._call(args, kwargs)
        with recomputing():
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.parameters.call(args, kwargs)
        plan = None if call is None else self._plan(call)
        if call is None or plan is None:
            if not torch.compiler.is_compiling() and getattr(self.module, "qconfig", None) is not None:
                _warn_of_quantisation()
            return type(self.module).forward(self.module, *args, **kwargs)
        if plan.paired:
            return plan.run(self.module, call.tensors[0], call.tensors[0], False)[0]
        return plan.run(self.module, *call.tensors)

    def replica(self) -> nn.Module:
        """What nn.DataParallel asks of a module: a shallow copy, which would have the forward of the original."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        FusedForward(replica, self.plans, self.places, self.refused, self.recomputed).put_on()
        return replica

    def extra_repr(self) -> str:
        """What the module's repr says of it, and in a line of its own what is fused."""
        own = type(self.module).extra_repr(self.module)
        what = ", ".join(self.places) or "pairs handed on"
        if not any(self.plans.values()):
            what = "outputs made again in the backward"
        elif not any(plan.holds(self.module) for plans in self.plans.values() for plan in plans):
            what = "no more: the module has changed, call fuse_ again"
        return "\n".join([own] * bool(own) + [f"fused: {what}"])

    def forward_forked(self, x: Tensor, shortcut: Tensor, forked: bool) -> tuple[Tensor, Tensor] | None:
        """See ``ForkedBlock``; None where the module must be called as any other."""
        if _is_looked_into():
            return None
        plan = next((plan for plan in self.plans.get(self.plain, ()) if plan.holds(self.module)), None)
        if plan is None or not plan.paired or is_watched(self.module):
            return None
        if not all(is_still(self.module, reader) for reader in plan.readers):
            return None
        return plan.run(self.module, x, shortcut if plan.takes_pair else x, forked)

    def obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why such a call runs the class's own forward, in words; None where it does not."""
        if _is_looked_into():
            return "hooks for every module are on"
        call = self.parameters.call(args, kwargs)
        if call is None:
            return "an argument is neither a tensor nor a number, text, list or dict"
        plans = self.plans.get(call.signature, ())
        if not plans:
            return f"no such place is in its code, or it cannot be traced, when called with ({call.signature})"
        changes = [plan.change(self.module) for plan in plans]
        if None in changes:
            return None
        path, what = next(change for change in reversed(changes) if change is not None)
        return f"{path or 'the module'} has changed since fuse_: {what}"

    def _plan(self, call: Call) -> Plan | None:
        plans = self.plans.get(call.signature)
        if plans is None:
            plans = self._new_plans(call)
        for plan in plans:
            if plan.holds(self.module):
                return plan
        return None

    def _new_plans(self, call: Call) -> tuple[Plan, ...]:
        """Of a call that the code of the model did not show: from a script, or from code that cannot be traced."""
        # PyTorch is patched for it, which compilers cannot see through and other threads must not meet half-way.
        if torch.compiler.is_compiling() or threading.current_thread() is not threading.main_thread():
            return ()
        if len(self.plans) >= MOST_CALLS:
            return ()
        # It imports this module.
        from .planning import plans_of

        self.plans[call.signature] = plans_of(self.module, call, self.refused, self.recomputed)
        return self.plans[call.signature]

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a method's, which wrappers wrap and bind again: to the module, and by deepcopy to its copy."""
        return forward

    @property
    def __globals__(self) -> dict[str, Any]:
        """What torch.jit.script cannot do without. An AttributeError, as others ask whether there are any."""
        raise AttributeError("torch.jit.script cannot compile a fused forward: call resfused.unfuse_(model) before it")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """Where torch.export says that the forward is written."""
        return type(self.module).forward.__code__


def fused_forward(module: nn.Module) -> FusedForward | None:
    """That of the module, also where others have put their own forward over it."""
    found = getattr(module.__dict__.get("extra_repr"), "__self__", None)
    return found if isinstance(found, FusedForward) else None


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Named as what pickle is to look up in a module."""
    fused = fused_forward(module)
    return type(module).forward(module, *args, **kwargs) if fused is None else fused(*args, **kwargs)


def _is_looked_into() -> bool:
    """Whether every call is to be seen: by hooks, or by torch.jit.trace, whose programs do without this package."""
    return _has_any_global_hook() or torch.jit.is_tracing()


def _warn_of_quantisation() -> None:
    warnings.warn(
        "the model was prepared for quantisation after fuse_, and each operator is observed: nothing is fused any more",
        stacklevel=2,
    )


def forked_call(module: nn.Module, x: Tensor, shortcut: Tensor, forked: bool) -> tuple[Tensor, Tensor]:
    """module(x) for two uses, ``x`` and ``shortcut`` being one value for two uses; see ``ForkedBlock``."""
    if takes_pairs(module):
        return cast(ForkedBlock, module).forward_forked(x, shortcut, forked)
    fused = module.__dict__.get("forward")
    pair = fused.forward_forked(x, shortcut, forked) if isinstance(fused, FusedForward) else None
    if pair is not None:
        return pair
    y = module(x)
    return y, y


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``forward`` of the source, whose lines tracebacks and debuggers show."""
    file = f"<resfused.fuse_ {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(names)
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]


class _Named(NamedTuple):
    """A module, function or class by its name, as pickle would not find all of PyTorch's."""

    name: str


def _reference(value: Any) -> Any:
    if isinstance(value, ModuleType):
        return _Named(value.__name__)
    if callable(value):
        name = _Named(_get_qualified_name(value))
        # What has no such name, NoneType or a local function, is left to pickle.
        with suppress(AttributeError, ImportError, ValueError):
            if _resolved(name) is value:
                return name
    return value


def _resolved(value: Any) -> Any:
    if not isinstance(value, _Named):
        return value
    if "." not in value.name:
        return getattr(builtins, value.name, None) or import_module(value.name)
    return resolve_name(value.name)


def _restored(source: str, names: dict[str, Any], *rest: Any) -> Plan:
    return Plan(source, {name: _resolved(value) for name, value in names.items()}, *rest)
