"""Result files: everything as JSON, one row a measurement as CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import environment
from gate import Verdict
from node_timing import Timing


def write(
    folder: Path, settings: dict[str, Any], gate: list[Verdict], timings: list[Timing], copy: float
) -> list[Path]:
    """``<time>.json`` with raw samples and ``<time>.csv`` with medians, in ``folder``."""
    made = environment()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / made["time"].replace(":", "").removesuffix("+0000")
    rows = [_row(t, variant, copy) for t in timings for variant in t.samples]
    content = {
        "environment": made,
        "settings": settings,
        "copy_gb_s": copy,
        "gate": [{**asdict(v), "passed": v.passed} for v in gate],
        "rows": rows,
        "samples_ms": [asdict(t) for t in timings],
    }
    paths = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return paths


def _row(t: Timing, variant: str, copy: float) -> dict[str, Any]:
    return {
        "form": t.node.form,
        "channels": t.node.channels,
        "height": t.node.height,
        "width": t.node.width,
        "batch": t.batch,
        "dtype": t.dtype,
        "layout": t.layout,
        "phase": t.phase,
        "variant": variant,
        "p20_ms": t.quantile(variant, 20),
        "median_ms": t.milliseconds(variant),
        "p80_ms": t.quantile(variant, 80),
        "gb_s": t.bandwidth(variant),
        "of_copy": t.bandwidth(variant) / copy,
    }
