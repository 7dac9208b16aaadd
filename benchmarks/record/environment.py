"""Where and with what a result was made."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: str = "cuda") -> dict[str, Any]:
    """GPU, driver, processor, threads, versions, commit and time, as every result file carries them.

    ``device``: "cpu" where a GPU that may be there was not used. The commit of a copy without git's folder is what the
    environment variable RESFUSED_COMMIT says.
    """
    on_gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
        or os.environ.get("RESFUSED_COMMIT"),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "compiler": (_output(*os.environ.get("CXX", "c++").split(), "--version") or "").partition("\n")[0] or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _processor() -> str:
    """The model's name, where Linux says it."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Of the first core, as Linux says: ``{"1 Data": "32K", ...}``."""

    def words(cache: Path, name: str) -> str:
        return (cache / name).read_text().strip()

    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    try:
        return {f"{words(cache, 'level')} {words(cache, 'type')}": words(cache, "size") for cache in folders}
    except OSError:
        return {}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
