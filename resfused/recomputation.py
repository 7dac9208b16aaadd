"""Outputs of fused nodes that are made again in the backward, instead of kept by those that need them there.

``saved_tensors_hooks`` show every tensor that a node of the graph keeps for its backward. Where that is the output y of
a fused node, and what y was made of is kept anyway, the one who wants to keep it is given a handle in its place, and y
is freed as soon as the forward is done with it. The first in the backward to want it makes it again, by the last phase
of the forward alone; the others find it there.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .operator import FusedResidualBlock, SynchronisedResidualBlock
from .operator.last_phase import LastPhase

_NODES = (FusedResidualBlock, SynchronisedResidualBlock)
_NOTHING: AbstractContextManager[None] = nullcontext()


def recomputing() -> AbstractContextManager[Any]:
    """In it the outputs that were ``offer``-ed are not kept.

    Nothing where other hooks are in force, those of a checkpoint or of ``save_on_cpu``, which decide then what is kept;
    under torch.compile, whose partitioner decides it; and in torch.func, which allows no hooks.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _NOTHING
    if _hooks() is not None or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    for key in [key for key, each in list(_offers.items()) if each.storage.expired()]:
        _offers.pop(key, None)
    return saved_tensors_hooks(_pack, _unpack)


def offer(y: Tensor, input: Tensor, residual: Tensor | None) -> None:
    """Lets ``y``, which a fused node has just made of the others, be made again, where these are kept anyway."""
    hooks = None if torch.compiler.is_compiling() else _hooks()
    if hooks is None or hooks[0] is not _pack:
        return
    node: Any = y.grad_fn
    kind: Any = getattr(type(node), "_forward_cls", None)
    if kind not in _NODES:
        return
    sources = [source for t in (input, residual) if t is not None and (source := _keeper(t)) is not None]
    phase = kind.last_phase(node) if len(sources) == (1 if residual is None else 2) else None
    if phase is not None:
        _offers[_key(y)] = _Offer(y, sources, phase)


def _hooks() -> Any:
    """The pair in force, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Whole:
    """A tensor that is kept as it is, of which a change in place is an error, as it is without hooks."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # Its own graph would hold the node that keeps it, were it that node's output.
        self.tensor = tensor.detach() if tensor.requires_grad else tensor
        self.version = tensor._version

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; "
                f"expected version {self.version} instead"
            )
        return self.tensor


_kept: weakref.WeakValueDictionary[int, _Whole] = weakref.WeakValueDictionary()
"""By the storage, which is alive as long as the value is."""


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _keeper(t: Tensor) -> _Whole | None:
    """Whose copy of ``t`` is alive for a backward anyway."""
    found = _kept.get(_key(t))
    return found if found is not None and found.tensor.is_set_to(t) else None


class _Offer:
    """How an output can be made again, until somebody wants to keep it. It keeps no activation alive."""

    def __init__(self, y: Tensor, sources: list[_Whole], phase: LastPhase):
        self.storage = StorageWeakRef(y.untyped_storage())
        self.dtype = y.dtype
        self.version = y._version
        self.sources = [weakref.ref(source) for source in sources]
        self.phase = phase
        self.taken: Any = None

    def take(self, y: Tensor) -> _Output | None:
        """For ``y`` or a view of it; None where it has changed since, or is not to be had any more."""
        if y._version != self.version or y.dtype is not self.dtype:
            return None
        output = None if self.taken is None else self.taken()
        if output is None:
            sources = [found for source in self.sources if (found := source()) is not None]
            if len(sources) < len(self.sources):
                return None
            output = _Output(y, sources, self.phase)
            self.taken = weakref.ref(output)
        return output


_offers: dict[int, _Offer] = {}
"""By the storage, whose number is no other's while the offer has a weak reference."""


class _Output:
    """What one output is made of, for the handles in its place."""

    def __init__(self, y: Tensor, sources: list[_Whole], phase: LastPhase):
        self.sources = sources
        self.phase = phase
        self.handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        # It has no memory, and counts the changes of y.
        witness = y.detach()
        witness.data = y.new_empty(0)
        self.witness = _Whole(witness)

    def inputs(self) -> list[Tensor]:
        self.witness.unpack()
        return [source.unpack() for source in self.sources]


class _Handle:
    """What one node keeps instead of an output or a view of it."""

    def __init__(self, output: _Output, t: Tensor):
        self.output = output
        self.place = t.size(), t.stride(), t.storage_offset()
        self.made: tuple[Tensor, Any] | None = None
        """Where another has made it, and on which stream."""
        output.handles.add(self)

    def unpack(self) -> Tensor:
        inputs = self.output.inputs()
        stream = torch.cuda.current_stream(inputs[0].device) if inputs[0].is_cuda else None
        made, self.made = self.made, None
        if made is None or made[1] != stream:
            made = self.output.phase.run(*inputs), stream
            if stream is not None:
                for t in inputs:
                    t.record_stream(stream)
            for handle in self.output.handles:
                if handle is not self:
                    handle.made = made
        return made[0].as_strided(*self.place)


def _pack(t: Tensor) -> _Whole | _Handle:
    # Parameters are no activations, and a subclass may have no storage.
    if type(t) is not Tensor or t.layout is not torch.strided:
        return _Whole(t)
    key = _key(t)
    found = _offers.get(key)
    output = None if found is None else found.take(t)
    if output is not None:
        return _Handle(output, t)
    whole = _kept[key] = _Whole(t)
    return whole


def _unpack(kept: _Whole | _Handle) -> Tensor:
    return kept.unpack()
