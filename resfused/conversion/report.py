"""What ``fuse_`` did, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from io import StringIO

_EAGER = {"norm+relu": 13.0, "norm+add+relu": 16.0, "norm+add(norm)+relu": 24.0}
_OURS = {"norm+relu": 8.0, "norm+add+relu": 10.125, "norm+add(norm)+relu": 13.0}
_FORK_EAGER = 3.0
_FORK_OURS = {"norm+relu": 2.0, "norm+add+relu": 1.0, "norm+add(norm)+relu": 2.0}


@dataclass(frozen=True)
class Fused:
    """One fused place.

    ``module``: the qualified name of the module whose forward has it; ``form``: ``"norm+relu"``, ``"norm+add+relu"`` or
    ``"norm+add(norm)+relu"``; ``norms``: the qualified names of its one or two BatchNorms; ``forked``: whether its
    output goes to the next block as a pair; ``in_training``: False where it is fused in evaluation only.
    """

    module: str
    form: str
    norms: tuple[str, ...]
    forked: bool
    in_training: bool

    @property
    def passes_saved(self) -> float:
        """Readings and writings of the activation that a training step is spared, in half precision.

        Against eager PyTorch, whose operators read and write it 13, 16 and 24 times in the three forms, and 3 times
        more to add the two gradients of an output with two uses. Nothing for what is fused in evaluation only.
        """
        if not self.in_training:
            return 0.0
        saved = _EAGER[self.form] - _OURS[self.form]
        return saved + (_FORK_EAGER - _FORK_OURS[self.form] if self.forked else 0.0)


@dataclass(frozen=True)
class Left:
    """A BatchNorm that was left as it is: its qualified name, and why."""

    norm: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was fused and what was left; ``print`` shows it as a table."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """The qualified names of all BatchNorms that are in fused places."""
        return tuple(norm for entry in self.fused for norm in entry.norms)

    @property
    def passes_saved(self) -> float:
        """Of all places, see ``Fused.passes_saved``: each counts in activations of its own size."""
        return sum(entry.passes_saved for entry in self.fused)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self._summary(), title_justify="left", title_style="bold")
        for heading in ("module", "form", "norms", "passes saved"):
            table.add_column(heading, justify="right" if heading == "passes saved" else "left", overflow="fold")
        for entry in self.fused:
            form = entry.form + (", pair handed on" if entry.forked else "")
            form += "" if entry.in_training else ", in evaluation only"
            table.add_row(entry.module or "the model", form, ", ".join(entry.norms), f"{entry.passes_saved:.2f}")
        text = StringIO()
        console = Console(file=text, width=140)
        console.print(table)
        if self.left:
            table = Table(title="Left as they are", title_justify="left", title_style="bold")
            table.add_column("norm", overflow="fold")
            table.add_column("because", overflow="fold")
            for each in self.left:
                table.add_row(each.norm, each.reason)
            console.print(table)
        return text.getvalue().rstrip()

    def _summary(self) -> str:
        forms = Counter(entry.form for entry in self.fused)
        parts = ", ".join(f"{number} {form}" for form, number in forms.items())
        total = len(self.norms) + len(self.left)
        return f"{len(self.norms)} of {total} norms fused in {len(self.fused)} places" + (f": {parts}" if parts else "")
