"""The tables of the page that tells the story, written from the result files between its markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science import agreement, records
from science.records import Content

PAGE = Path(__file__).parent / "README.md"


def write(experiments: Mapping[str, Any], folder: Path, path: Path = PAGE) -> Path:
    """Of every experiment, a module by its name, whose result file lies in ``folder``; the others' tables stay.

    The wall times stay unless all are there.
    """
    text = path.read_text()
    found = records.read_all(folder, experiments)
    for name, content in found.items():
        text = between(text, name, _story(experiments[name], content))
    if len(found) == len(experiments):
        text = between(text, "wall time", _wall_times(found))
    path.write_text(text)
    return path


def between(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``. Raises: ValueError where it has no such markers."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page must have one pair of markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _story(experiment: Any, content: Content) -> str:
    found = content["agreements"]
    return "\n\n".join([
        f"{experiment.title(content)}:", markdown(experiment.HEADINGS, experiment.summary(content)),
        "\n".join(f"- {finding}" for finding in experiment.findings(content)),
        f"{agreement.title(found)}:", markdown(agreement.HEADINGS, agreement.summary(found)),
    ])  # fmt: skip


def _wall_times(found: Mapping[str, Content]) -> str:
    rows = [
        (name, c["device"], str(c["processes"]), f"{c['wall_seconds']:.0f}", c["environment"]["commit"])
        for name, c in found.items()
    ]
    total = sum(content["wall_seconds"] for content in found.values())
    rows.append(("all", "", "", f"{total:.0f}", ""))
    return markdown(("experiment", "device", "processes", "wall time, s", "commit"), rows)
