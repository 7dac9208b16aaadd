"""Triton's launcher as it is, above a driver that launches nothing. Needs a C compiler, and no TRITON_INTERPRET."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from count.offline import target_of

# What is asked, and answered with more than success: a context, an address, numbers of an H100.
_ANSWERS = {
    "cuCtxGetCurrent": "(void **out) { *out = (void *)1; return 0; }",
    "cuDevicePrimaryCtxRetain": "(void **out) { *out = (void *)1; return 0; }",
    "cuPointerGetAttribute": "(void **out, int what, void *pointer) { *out = pointer; return 0; }",
    "cuDeviceGetAttribute": "(int *out) { *out = 232448; return 0; }",
    "cuFuncGetAttribute": "(int *out) { *out = 1024; return 0; }",
    "cuGetErrorString": '(int error, const char **out) { *out = ""; return 0; }',
}
_LAUNCHES = "cuLaunchKernelEx"


class _Driver(nvidia.CudaDriver):
    """Without what PyTorch would be asked, which knows of no GPU."""

    def __init__(self, architecture: str):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self._target = target_of(architecture)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0


@contextmanager
def launching_nothing(architecture: str, folder: Path) -> Iterator[ctypes.c_int]:
    """Within it kernels compile and launch on CPU tensors, up to the driver; yields the number of launches.

    ``folder`` takes the driver. What was launched in one such context must not be in another: it stays compiled.
    """
    library = ctypes.CDLL(str(_library(folder)), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    previous = driver._active
    driver.set_active(_Driver(architecture))
    try:
        yield ctypes.c_int.in_dll(library, "launches")
    finally:
        driver._active = previous


def _library(folder: Path) -> Path:
    """libcuda.so.1 with every function that Triton names."""
    sources = [Path(nvidia.dirname) / name for name in ("driver.c", "driver.py")]
    names = {name for source in sources for name in re.findall(r"\bcu[A-Z]\w+\b", source.read_text())}
    answers = _ANSWERS | {_LAUNCHES: "() { launches++; return 0; }"}
    functions = [f"int {name}{answers.get(name, '() { return 0; }')}" for name in sorted(names | answers.keys())]
    (folder / "stub.c").write_text("\n".join(["int launches;", *functions, ""]))
    path = folder / "libcuda.so.1"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    flags = ["-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{path.name}"]
    subprocess.run([compiler, *flags, "-o", path, folder / "stub.c"], check=True)
    (folder / "libcuda.so").symlink_to(path.name)
    return path
