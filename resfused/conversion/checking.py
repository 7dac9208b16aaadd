"""What of a report runs: the model is called once in each mode, and who calls the fused operations is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import functional, norms
from ..backend import backend_for
from ..kernels.activation import IDENTITY
from ..operator import synchronised
from . import calls
from .fused_forward import FusedForward, fused_forward

if TYPE_CHECKING:
    from .report import Fused, Report


@dataclass(frozen=True)
class Idle:
    """A reported place that did not run fused: its mode, and why."""

    place: Fused
    training: bool
    reason: str


@dataclass(frozen=True)
class Check:
    """What ran fused in one call in training and one in evaluation; ``print`` shows it in short."""

    norms: tuple[str, ...]
    """The qualified names of the BatchNorms that ran fused in training."""
    norms_in_evaluation: tuple[str, ...]
    places: tuple[int, int]
    """The reported places that ran fused, in training and in evaluation."""
    idle: tuple[Idle, ...]
    """Those that did not."""

    def __str__(self) -> str:
        """How many places ran, and why the others did not, a line for each reason."""
        counted = []
        for training, ran, mode in zip((True, False), self.places, ("training", "evaluation"), strict=True):
            of = ran + sum(each.training is training for each in self.idle)
            counted.append(f"{ran} of {of} places ran fused in {mode}")
        lines = [", ".join(counted)]
        for reason in dict.fromkeys(each.reason for each in self.idle):
            names = dict.fromkeys(norm for each in self.idle if each.reason == reason for norm in each.place.norms)
            lines += [f"{len(names):6} {reason}", f"{'':6} {', '.join(names)}"]
        return "\n".join(lines)


def check(report: Report, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Check:
    """See ``Report.check``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    modules = dict(model.named_modules())
    for place in report.fused:
        if place.module not in modules:
            raise ValueError(f"model must be the one that was fused, but has no submodule {place.module}")
    watches = {training: _watched(model, training, inputs, named) for training in (True, False)}
    idle, ran = [], [0, 0]
    for training, watch in watches.items():
        for place in report.fused:
            if not (place.in_training if training else place.in_evaluation):
                continue
            used = {modules[name] for name in place.norms}
            if used <= watch.ran:
                ran[not training] += 1
            else:
                idle.append(Idle(place, training, watch.reason(modules[place.module], used)))
    names = ([name for name, module in modules.items() if module in watches[mode].ran] for mode in (True, False))
    return Check(*map(tuple, names), (ran[0], ran[1]), tuple(idle))  # type: ignore[call-arg]


class _Watch:
    """Who ran fused in one call of a model, and what kept the others from it."""

    def __init__(self, model: nn.Module):
        self.ran: set[nn.Module] = set()
        self.plain: set[nn.Module] = set()
        """Norms alone, of which without the kernels nothing is fused."""
        self.kept: dict[nn.Module, str | None] = {}
        """Of every module with a fused forward that was called: what kept it from running, of its last call."""
        self.norms: list[tuple[nn.Module, nn.Module | None]] = []
        """Those of the calls that are under way."""
        self.owners = {id(t): m for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}

    def reason(self, module: nn.Module, used: set[nn.Module]) -> str:
        """Why the module's place of the norms ``used`` did not run fused."""
        if fused_forward(module) is None:
            return "the module has no fused forward any more"
        if module not in self.kept:
            return "the model does not call the module"
        if used <= self.plain:
            return "a norm alone is PyTorch's own operator where the kernels do not run"
        return self.kept[module] or "its shapes, dtypes or modes are not those of a fused operation"

    def tail(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def called(
            norm: nn.Module, input: Tensor, residual: Any = None, residual_norm: Any = None, *rest: Any, **named: Any
        ) -> Any:
            self.norms.append((norm, residual_norm))
            try:
                return plain(norm, input, residual, residual_norm, *rest, **named)
            finally:
                self.norms.pop()

        return called

    def node(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Of an operation on (input, residual, norm, residual_norm, activation, ...)."""

        def called(input: Tensor, residual: Any, norm: Any, residual_norm: Any, *rest: Any, **named: Any) -> Any:
            alone = residual is None and rest[0] == IDENTITY
            noted = self.plain if alone and backend_for(input) == "torch" else self.ran
            own = self.norms[-1] if self.norms else (self._owner(norm), self._owner(residual_norm))
            used = zip(own, (norm, residual_norm), strict=True)
            noted.update(module for module, tensors in used if module is not None and tensors is not None)
            return plain(input, residual, norm, residual_norm, *rest, **named)

        return called

    def forward(self, fused: FusedForward, *args: Any, **kwargs: Any) -> Any:
        result = _forward(fused, *args, **kwargs)
        self.kept[fused.module] = fused.obstacle(args, kwargs)
        return result

    def forward_forked(self, fused: FusedForward, x: Tensor, *rest: Any) -> Any:
        result = _forward_forked(fused, x, *rest)
        if result is not None:
            self.kept[fused.module] = None
        return result

    def _owner(self, tensors: Any) -> nn.Module | None:
        found = (self.owners.get(id(t)) for t in tensors or () if isinstance(t, Tensor))
        return next((module for module in found if module is not None), None)


_forward, _forward_forked = FusedForward.__call__, FusedForward.forward_forked


def _watched(model: nn.Module, training: bool, inputs: tuple[Any, ...], named: dict[str, Any]) -> _Watch:
    """One call, which leaves the model as it was."""
    watch = _Watch(model)
    given, given_named = pytree.tree_map_only(Tensor, Tensor.clone, (inputs, named))
    with restored(model), ExitStack() as stack:
        model.train(training)
        for place in (norms, functional, synchronised):
            stack.enter_context(
                mock.patch.object(place, "normalise_add_activate", watch.node(place.normalise_add_activate))
            )
        stack.enter_context(mock.patch.object(calls, "forked_tail", watch.tail(calls.forked_tail)))
        for name, function in (("__call__", watch.forward), ("forward_forked", watch.forward_forked)):
            stack.enter_context(mock.patch.object(FusedForward, name, _as_method(function)))
        with torch.no_grad():
            model(*given, **given_named)
    return watch


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda fused, *args, **kwargs: function(fused, *args, **kwargs)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and the state of random numbers are afterwards what they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
