"""Outputs of fused nodes that are made again in the backward, instead of kept by those that need them there.

``saved_tensors_hooks`` show every tensor that a node of the graph keeps for its backward. Where that is the output y of
a fused node, and what y was made of is kept anyway, the one who wants to keep it is given a handle in its place, and y
is freed as soon as the forward is done with it. The first in the backward to want it makes it again, by the last phase
of the forward alone; the others find it there. A concatenation is made again of its parts, of which each is kept once,
in however many concatenations it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .operator.last_phase import LastPhase

_NOTHING: AbstractContextManager[Forward | None] = nullcontext()


def recomputing() -> AbstractContextManager[Forward | None]:
    """In it the outputs that are offered are not kept; the forward whose they are.

    Nothing where other hooks are in force, those of a checkpoint or of ``save_on_cpu``, which decide then what is kept;
    under torch.compile, whose partitioner decides it; and in torch.func, which allows no hooks.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _NOTHING
    if _hooks() is not None or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    return forgotten(Forward())


def offer(y: Tensor, input: Tensor, residual: Tensor | None) -> None:
    """Lets ``y``, which a fused node has just made of the others, be made again, where these are to be had anyway."""
    forward = _forward()
    if forward is None:
        return
    phase = getattr(y.grad_fn, "last_phase", None)
    if not isinstance(phase, LastPhase):
        return
    # A shortcut that is made again itself would be a chain as long as the stage.
    sources = [forward.made_again(input) or forward.keeper(input)]
    if residual is not None:
        sources.append(forward.keeper(residual))
    if None not in sources:
        forward.add(y, sources, phase.apart().run)


def offer_concatenation(y: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    """Lets ``y``, which torch.cat has just made of ``tensors``, be made again. They are kept instead, each once."""
    forward = _forward()
    if forward is None or not all(map(_has_storage, (y, *tensors))):
        return
    sources = [forward.made_again(t) or forward.keeper(t) or forward.keep_whole(t) for t in tensors]
    if None not in sources:
        forward.add(y, sources, partial(_cat, dim))


def _hooks() -> Any:
    """The pair in force, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _forward() -> Forward | None:
    """The forward whose hooks are in force."""
    hooks = None if torch.compiler.is_compiling() else _hooks()
    forward = None if hooks is None else getattr(hooks[0], "__self__", None)
    return forward if isinstance(forward, Forward) else None


@contextmanager
def forgotten(forward: Forward) -> Iterator[Forward]:
    """Its hooks are in force; at the end it forgets what was offered."""
    try:
        with saved_tensors_hooks(forward.pack, _unpack):
            yield forward
    finally:
        # The hooks live as long as the graph.
        forward.outputs.clear()


class _Source(Protocol):
    """What an output is made of."""

    def check(self) -> None:
        """Raises: RuntimeError where it has been changed in place."""

    def unpack(self) -> Tensor: ...


class Forward:
    """What one forward has kept, and what it has made that can be made again: by storage."""

    def __init__(self) -> None:
        self.kept: weakref.WeakValueDictionary[int, _Whole] = weakref.WeakValueDictionary()
        self.outputs: dict[int, _Output] = {}

    @property
    def bytes(self) -> int:
        """Of the activations that are kept, each once."""
        return sum(whole.tensor.untyped_storage().nbytes() for whole in self.kept.values())

    def pack(self, t: Tensor) -> _Whole | _Handle:
        if not _has_storage(t):
            return _Whole(t)
        return self.made_again(t) or self.keep(t)

    def keep(self, t: Tensor) -> _Whole:
        whole = self.kept[_key(t)] = _Whole(t)
        return whole

    def keep_whole(self, t: Tensor) -> _Whole | None:
        """None for a part of something larger, all of which would be kept."""
        return self.keep(t) if t.untyped_storage().nbytes() == t.nbytes else None

    def keeper(self, t: Tensor) -> _Whole | None:
        """Whose copy of ``t`` is alive for a backward anyway."""
        found = self.kept.get(_key(t))
        return found if found is not None and found.tensor.is_set_to(t) else None

    def made_again(self, t: Tensor) -> _Handle | None:
        """In place of an output or a view of one, if it has not been changed."""
        output = self.outputs.get(_key(t))
        return _Handle(output, t) if output is not None and output.gives(t) else None

    def add(self, y: Tensor, sources: list[Any], function: Callable[..., Tensor]) -> None:
        """``y`` is what the function makes of the sources."""
        self.outputs[_key(y)] = _Output(y, sources, function)


def _cat(dim: int, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, dim)


class ForwardThatKeeps(Forward):
    """One in which nothing is made again."""

    def add(self, y: Tensor, sources: list[Any], function: Callable[..., Tensor]) -> None:
        """Not taken."""


def _has_storage(t: Tensor) -> bool:
    """And is no parameter, which is no activation."""
    return type(t) is Tensor and t.layout is torch.strided


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Whole:
    """A tensor that is kept as it is, of which a change in place is an error, as it is without hooks."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # Its own graph would hold the node that keeps it, were it that node's output.
        self.tensor = tensor.detach() if tensor.requires_grad else tensor
        self.version = tensor._version

    def check(self) -> None:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; "
                f"expected version {self.version} instead"
            )

    def unpack(self) -> Tensor:
        self.check()
        return self.tensor


class _Output:
    """How one output is made again, for the handles in its place."""

    def __init__(self, y: Tensor, sources: list[_Source], function: Callable[..., Tensor]):
        # While there is a weak reference no other storage has its number.
        self.storage = StorageWeakRef(y.untyped_storage())
        self.dtype, self.device = y.dtype, y.device
        self.sources = sources
        self.function = function
        self.handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        # It has no memory, and counts the changes of y.
        witness = y.detach()
        witness.data = y.new_empty(0)
        self.witness = _Whole(witness)

    def gives(self, t: Tensor) -> bool:
        return t._version == self.witness.version and t.dtype is self.dtype

    def check(self) -> None:
        self.witness.check()
        for source in self.sources:
            source.check()

    def make(self, stream: Any) -> Tensor:
        sources = [source.unpack() for source in self.sources]
        if stream is not None:
            for t in sources:
                t.record_stream(stream)
        return self.function(*sources)


class _Handle:
    """What is kept instead of an output or a view of it."""

    def __init__(self, output: _Output, t: Tensor):
        self.output = output
        self.place = t.size(), t.stride(), t.storage_offset()
        self.made: tuple[Tensor, Any] | None = None
        """Where another has made it, and on which stream."""
        output.handles.add(self)

    def check(self) -> None:
        self.output.check()

    def unpack(self) -> Tensor:
        self.check()
        device = self.output.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        made, self.made = self.made, None
        if made is None or made[1] != stream:
            made = self.output.make(stream), stream
            for handle in self.output.handles:
                if handle is not self:
                    handle.made = made
        return made[0].as_strided(*self.place)


def _unpack(kept: _Whole | _Handle) -> Tensor:
    return kept.unpack()
