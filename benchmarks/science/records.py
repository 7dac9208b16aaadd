"""Result files of the experiments: one JSON each, with where it was made, the settings and every raw number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record.environment import environment

Content = dict[str, Any]


def write(folder: Path, name: str, content: Content) -> Path:
    """``<folder>/<name>.json``; lists of numbers take one line each."""
    path = folder / f"{name}.json"
    text = json.dumps({"environment": environment(), **content}, indent=1)
    path.write_text(re.sub(r"\[\s+([^][{}]*?)\s+\]", _on_one_line, text) + "\n")
    return path


def read(folder: Path, name: str) -> Content:
    content: Content = json.loads((folder / f"{name}.json").read_text())
    return content


def read_all(folder: Path, names: Iterable[str]) -> dict[str, Content]:
    """Those of ``names`` that are there."""
    return {name: read(folder, name) for name in names if (folder / f"{name}.json").exists()}


def rounded(values: list[float], digits: int = 5) -> list[float]:
    """To so many significant digits, as curves are kept that nothing is subtracted from."""
    return [float(f"{value:.{digits}g}") for value in values]


def _on_one_line(found: re.Match[str]) -> str:
    return "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]"
