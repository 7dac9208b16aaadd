"""What ``fuse_`` did, as data, in short and in full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from torch import nn

from .checking import Check, check
from .passes import eager, ours
from .saving import saved_bytes

_LINES, _FORMS, _NAMES = 15, 6, 3
"""How many lines ``str`` has at most, for how many forms, and how many norms it names of each reason."""


@dataclass(frozen=True)
class Fused:
    """One fused place.

    ``module``: the qualified name of the module whose forward has it; ``form``: ``"norm"``, ``"norm+add"`` or
    ``"norm+add(norm)"``, and where an activation follows its name, ``"norm+add+relu"``; ``norms``: the qualified names
    of its one or two BatchNorms; ``forked``: whether its output goes to the next block as a pair; ``in_training``,
    ``in_evaluation``: whether it is fused there; ``recomputed``: whether its output is made again in the backward
    instead of kept for it, where what it is made of is kept anyway; ``frozen``: whether its norms are none of PyTorch's
    but frozen ones, see ``tail``.
    """

    module: str
    form: str
    norms: tuple[str, ...]
    forked: bool
    in_training: bool
    in_evaluation: bool = True
    recomputed: bool = False
    frozen: bool = False

    @property
    def kind(self) -> str:
        """The form, and whether the norms are frozen."""
        return f"frozen {self.form}" if self.frozen else self.form

    @property
    def passes_saved(self) -> float:
        """Readings and writings of the activation that a training step is spared, in half precision.

        Against eager PyTorch, whose operators read and write it 13, 16 and 24 times in the three forms with an
        activation, 11, 14 and 20 times where the norms are frozen, and 3 times more to add the two gradients of an
        output with two uses. Nothing for a norm alone that is not frozen, nor for what is fused in evaluation only.
        """
        given = self.form, self.forked, self.frozen
        return eager(*given) - ours(*given) if self.in_training else 0.0


@dataclass(frozen=True)
class Left:
    """A BatchNorm that is not fused in training: its qualified name, and why."""

    norm: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was fused and what was left; ``print`` shows it in short, ``table()`` is the whole."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]
    on_kernels: bool = field(default=True, compare=False)
    """Whether the kernels run where the model was; elsewhere PyTorch's operators do, and save no passes."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The qualified names of all BatchNorms that are fused in training."""
        return self._in([entry for entry in self.fused if entry.in_training])

    @property
    def norms_in_evaluation(self) -> tuple[str, ...]:
        """The qualified names of all BatchNorms that are fused in evaluation."""
        return self._in([entry for entry in self.fused if entry.in_evaluation])

    @staticmethod
    def _in(places: list[Fused]) -> tuple[str, ...]:
        """Each once: it may be in places of two forms."""
        return tuple(dict.fromkeys(norm for entry in places for norm in entry.norms))

    @property
    def passes_saved(self) -> float:
        """Of all places on the kernels, see ``Fused.passes_saved``: each counts in activations of its own size."""
        return sum(entry.passes_saved for entry in self.fused)

    def check(self, model: nn.Module, *inputs: Any, **named: Any) -> Check:
        """Calls ``model(*inputs, **named)`` once in training and once in evaluation; what of the report ran fused.

        Without gradients; modes, buffers and random numbers are afterwards as before. The model is the one that was
        fused, as it is now: hooks, changed values and other arguments show. Raises: TypeError where ``model`` is no
        module, ValueError where it has not the modules of the report; what the model itself raises.
        """
        return check(self, model, inputs, named)

    def saved_bytes(self, model: nn.Module, *inputs: Any, **named: Any) -> int:
        """Calls ``model(*inputs, **named)`` twice in training; the activations that ``recompute`` spares it, in bytes.

        Those alive at the end of the forward, which the backward needs: with every output kept, less with the model as
        it is. Modes, buffers and random numbers are afterwards as before. It is 0 for a compiled model, of which the
        compiler decides what is kept. Raises: TypeError where ``model`` is no module; what the model itself raises.
        """
        return saved_bytes(model, inputs, named)

    def __str__(self) -> str:
        """At most 15 lines: how much was fused, in which forms, and why the rest was left."""
        lines = [*self._summary(), *self._forms()]
        return "\n".join([*lines, *self._reasons(_LINES - len(lines))])

    def table(self) -> str:
        """Every place and every norm that was left, a line each."""
        places = [("module", "form", "norms", "passes saved")]
        for entry in self.fused:
            saved = f"{entry.passes_saved:.2f}" if self.on_kernels else "none here"
            places.append((entry.module or "the model", _form(entry), ", ".join(entry.norms), saved))
        lines = [*self._summary(), "", *_columns(places)]
        if self.left:
            lines += ["", "left as they are:"]
        for reason, names in self.reasons().items():
            lines += [f"{len(names):6} {reason}", *_indented(", ".join(names))]
        return "\n".join(lines)

    def _summary(self) -> list[str]:
        norms = _counted(len(self.norms) + len(self.left), "norm")
        first = f"{len(self.norms)} of {norms} fused in {_counted(sum(f.in_training for f in self.fused), 'place')}"
        if {*self.norms} != {*self.norms_in_evaluation}:
            places = _counted(sum(f.in_evaluation for f in self.fused), "place")
            first += f" in training, {len(self.norms_in_evaluation)} in {places} in evaluation"
        again = sum(entry.recomputed for entry in self.fused)
        lines = [first]
        if again:
            outputs = f"outputs of {_counted(again, 'place')}"
            lines.append(f"{outputs} made again in the backward; under torch.compile its partitioner decides that")
        if not self.fused or self.on_kernels:
            return lines
        return [*lines, "where the model is now, PyTorch's own operators run: on a GPU the kernels will"]

    def _forms(self) -> list[str]:
        counted = Counter(entry.kind for entry in self.fused)
        shown = counted if len(counted) <= _FORMS else dict(counted.most_common(_FORMS - 1))
        lines = [self._form(kind, count) for kind, count in shown.items()]
        if len(shown) < len(counted):
            rest = counted.total() - sum(shown.values())
            lines.append(f"{rest:6} of {_counted(len(counted) - len(shown), 'other form')}: see table()")
        return lines

    def _form(self, kind: str, count: int) -> str:
        places = [entry for entry in self.fused if entry.kind == kind]
        form, frozen = places[0].form, places[0].frozen
        before, after = eager(form, frozen=frozen), ours(form, frozen=frozen)
        pairs = sum(entry.forked for entry in places)
        untrained = sum(not entry.in_training for entry in places)
        saves = self.on_kernels and untrained < count and after < before
        passes = f": {after:.3g} passes over memory a training step, not {before:g}"
        return (
            f"{count:6} {kind}"
            + (passes if saves else "")
            + (f", {_counted(pairs, 'pair')} handed on" if pairs else "")
            + (f", {untrained} in evaluation only" if untrained else "")
        )

    def reasons(self) -> dict[str, tuple[str, ...]]:
        """The norms that were left by reason, those that most have first; in full where all have the same words."""
        groups: dict[str, list[Left]] = {}
        for each in self.left:
            groups.setdefault(_without_names(_line(each.reason)), []).append(each)
        found = {}
        for reason, lefts in sorted(groups.items(), key=lambda group: -len(group[1])):
            words = {_line(each.reason) for each in lefts}
            found[words.pop() if len(words) == 1 else reason] = tuple(each.norm for each in lefts)
        return found

    def _reasons(self, room: int) -> list[str]:
        """In as many lines at most."""
        largest = list(self.reasons().items())
        lines = ["left as they are:"] if largest else []
        shown = (room - 1) // 2 if 1 + 2 * len(largest) <= room else (room - 2) // 2
        for reason, names in largest[:shown]:
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            lines += [f"{len(names):6} {reason}", f"{'':6} {', '.join(names[:_NAMES])}{more}"]
        if len(largest) > shown:
            rest = sum(len(names) for _, names in largest[shown:])
            lines.append(f"{rest:6} for {_counted(len(largest) - shown, 'other reason')}: see table()")
        return lines


def _without_names(reason: str) -> str:
    """ "layer1.0.se, an SE, ..." of every block as one reason."""
    return re.sub(r"\b(?!model, )\S+, (?=an? \w+,)", "", reason)


def _form(entry: Fused) -> str:
    form = entry.kind + (", pair handed on" if entry.forked else "")
    form += ", made again" if entry.recomputed else ""
    return form + ("" if entry.in_training else ", in evaluation only")


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _indented(text: str) -> list[str]:
    return wrap(text, 120, initial_indent=" " * 7, subsequent_indent=" " * 7, break_on_hyphens=False)


def _line(text: str) -> str:
    return " ".join(text.split())


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Cells side by side, as wide as the widest of their column."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
