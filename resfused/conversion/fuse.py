"""``fuse_`` and ``unfuse_``: existing models with fused tails, in place."""

from __future__ import annotations

import sys

from torch import nn

from ..backend import backend_for, get_backend
from .fused_forward import FusedForward, fused_forward
from .planning import Filter, Planner
from .reading.tracing import traceable
from .reasons import left
from .report import Report


def fuse_(model: nn.Module, filter_fn: Filter | None = None, recompute: Filter | bool = False) -> Report:
    """Fuses every BatchNorm of ``model`` with the addition of a shortcut and the activation that follow it. In place.

    What a module's ``forward`` computes is traced with torch.fx; where it computes activation(norm(x) + s), or a part
    of that, it is given an equivalent forward of its own, which runs as long as everything that was found stays so
    (else, say after a hook was put on a ReLU, the class's own forward does). Activations are those of
    ``resfused.ACTIVATIONS``, written as a function, a method, a module or x * sigmoid(x). Classes, names, parameters,
    buffers and state_dict stay as they are; deepcopy and pickle keep what was fused. Calling it again starts anew from
    the model as it is.

    ``filter_fn(module, qualified_name)``: whether to fuse this BatchNorm; all by default.

    ``recompute``, or ``recompute(module, qualified_name)`` for this BatchNorm: the output of the place is not kept
    between forward and backward for the convolution, linear layer or pooling that wants it there, but made again from
    what is kept anyway: by one kernel, which reads and writes it once, bit for bit. See ``resfused.recomputation``.

    Returns what was fused, and what was left and why. Raises, before anything is changed: TypeError where ``model`` is
    not a module, ``filter_fn`` not callable or ``recompute`` neither a bool nor callable; ValueError where ``model`` is
    compiled already.
    """
    _check(model, filter_fn)
    if not isinstance(recompute, bool) and not callable(recompute):
        raise TypeError(f"recompute must be a bool or callable, but got {type(recompute).__name__}")

    def planned() -> tuple[list[FusedForward], Report]:
        planner = Planner(model, filter_fn, recompute)
        fused = planner.fused()
        return planner.forwards(), Report(fused, left(planner, fused), _on_kernels(model))

    forwards, report = traceable(model, planned)
    unfuse_(model)
    for forward in forwards:
        forward.put_on()
    return report


def unfuse_(model: nn.Module) -> None:
    """Undoes ``fuse_``: every module has its class's forward again, and nothing of resfused is left on it.

    Raises: TypeError where ``model`` is not a module.
    """
    _check(model, None)
    for module in model.modules():
        forward = fused_forward(module)
        if forward is not None:
            forward.take_off()


def _on_kernels(model: nn.Module) -> bool:
    """Whether activations take the kernels where the model's parameters lie."""
    places = [p for p in model.parameters() if p.is_floating_point()]
    # A CPU's are not compiled to find out: the model may be on its way to a GPU.
    if get_backend() == "auto" and any(p.device.type == "cpu" for p in places):
        return True
    try:
        return any(backend_for(p) != "torch" for p in places)
    except RuntimeError:
        # The kernels are forced; they cannot run there.
        return False


def _check(model: object, filter_fn: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, but got {type(filter_fn).__name__}")
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"its submodule {name}" if name else "it"
            raise ValueError(f"model must not be compiled yet, but {where} is: call fuse_ first, then torch.compile")


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped it, or its call."""
    # Importing torch._dynamo takes as long as torch itself; before it is, there is no compiled module.
    dynamo = sys.modules.get("torch._dynamo")
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapped or module._compiled_call_impl is not None
