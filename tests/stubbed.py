"""Programs beside the tests that need compiled kernels, where the tests' process has interpreted ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def results_of(program: Path, folders: pytest.TempPathFactory) -> Any:
    """What the program prints, as JSON; it is given a folder for a driver of stubs. Nothing is compiled before it."""
    if shutil.which("cc") is None:
        pytest.skip("the driver of stubs needs a C compiler, and there is none")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RESFUSED_BACKEND")}
    root = TESTS.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "benchmarks"), *sys.path])
    environment["TRITON_CACHE_DIR"] = str(folders.mktemp("triton"))
    command = [sys.executable, str(program), str(folders.mktemp("driver"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
