"""matplotlib's pyplot, drawing to files; loaded where something is drawn, so that all else does without it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return getattr(pyplot, name)
