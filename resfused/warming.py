"""``warm_up``: the kernels that a model's step launches, compiled before the first one, side by side."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import load_kernels
from .conversion.checking import restored
from .conversion.fuse import is_compiled


def warm_up(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Compiles in every core what ``model(*inputs, **named)`` launches, so that the first step waits for no compiler.

    Calls the model as it stands, in training with a backward, and in evaluation. What is not compiled yet is not
    launched there, and leaves zeros. Give it what a step is given: devices, dtypes, shapes and layouts decide on the
    kernels, and an autocast around this call. Afterwards buffers, gradients, modes and the state of random numbers are
    what they were. On CPUs the call itself compiles the kernels in C++ that are not there yet.

    Returns how many Triton kernels it compiled, or found in Triton's cache on the disk. No other thread may launch any
    meanwhile.

    Raises: TypeError where ``model`` is not a module; ValueError where it is compiled or holds a
    DistributedDataParallel, and where its outputs in training have no gradients though parameters want some; what the
    call raises, and what the compiler says of a kernel.
    """
    _check(model)
    kernels = load_kernels()
    if kernels is None:
        _call(model, inputs, named)
        return 0
    with kernels.ahead.noting() as missing, _Zeros(missing):
        _call(model, inputs, named)
    return kernels.ahead.compile_missing(missing)


class _Zeros(TorchDispatchMode):
    """Within it an operator of the library returns zeros where it added to ``missing`` what it did not launch.

    Memory that nothing was written to may hold anything: indices, say, that a model takes from its activations.
    """

    def __init__(self, missing: Sized):
        super().__init__()
        self._missing = missing

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self._missing)
        results = function(*args, **(kwargs or {}))
        if len(self._missing) > before:
            pytree.tree_map_only(Tensor, Tensor.zero_, results)
        return results


def _call(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """What a training step launches, where the model is in training, and an evaluation."""
    with restored(model):
        if model.training:
            with torch.enable_grad():
                _differentiate(model, inputs, named)
        model.eval()
        with torch.no_grad():
            _apart(model, inputs, named)


def _differentiate(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A forward, and a backward that no ``grad`` is told of."""
    results = _apart(model, inputs, named)
    leaves = [t for t in (*model.parameters(), *_tensors((inputs, named))) if t.requires_grad]
    outputs = [t for t in _tensors(results) if t.requires_grad]
    if leaves and not outputs:
        raise ValueError(
            f"model must return tensors with gradients in training, but returned {type(results).__name__} without any"
        )
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _apart(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Called with copies, which it may change."""
    given, given_named = pytree.tree_map_only(Tensor, Tensor.clone, (inputs, named))
    return model(*given, **given_named)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"its submodule {name}" if name else "it"
        if is_compiled(module):
            raise ValueError(f"model must not be compiled yet, but {where} is: call warm_up first, then torch.compile")
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model must be what DistributedDataParallel is given, but {where} is one: it would wait for the "
                "other processes' gradients; call warm_up first, or with its .module"
            )
