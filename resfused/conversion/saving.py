"""What of a report saves memory: the model is called in training, with and without its outputs made again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..recomputation import Forward, ForwardThatKeeps, forgotten
from .checking import restored


def saved_bytes(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """See ``Report.saved_bytes``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    kept, recomputed = (_kept(model, forward, inputs, named) for forward in (ForwardThatKeeps(), Forward()))
    return kept - recomputed


def _kept(model: nn.Module, forward: Forward, inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    given, given_named = pytree.tree_map_only(Tensor, Tensor.clone, (inputs, named))
    with restored(model), torch.enable_grad(), forgotten(forward):
        model.train()
        # It holds the graph, and that what is kept.
        result = model(*given, **given_named)
    kept = forward.bytes
    del result
    return kept
