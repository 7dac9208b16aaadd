"""The libraries of the C++ kernels: compiled at first use, kept in a cache folder, loaded once a process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..activation import ACTIVATIONS, RELU, Activation

SOURCES = Path(__file__).parent / "source"
# Each compiled on its own.
UNITS = ("backward.cpp", "forward.cpp")
# What is stored: the two dtypes that networks are trained in on CPUs, mixtures, and mixtures with float64.
KINDS = ("float32", "bfloat16", "mixed", "wide")
ANY = "any"


class Library(NamedTuple):
    """What a library is compiled for: an activation of ``ACTIVATIONS``, or ``ANY``, and one of ``KINDS``."""

    activation: str
    kind: str

    @property
    def flags(self) -> list[str]:
        """With -O1 where the activation is looked up for every pack: that is what the loops wait for."""
        name = "".join(map(str.capitalize, self.activation.split("_")))
        level = ["-O1"] if self.activation == ANY else []
        return [f"-DACTIVATION=k{name}", f"-DKIND={self.kind.capitalize()}Kind", *level]


def library_of(activation: Activation, kind: str) -> Library:
    """The library that has both.

    With the activation looked up for every pack a backward of 10 MB without one took 2.1 ms, compiled for it 1.6, and
    1.9 with a ReLU: only what is rare shares a library.
    """
    if kind in ("mixed", "wide") and activation != RELU:
        return Library(ANY, kind)
    return Library(activation.name, kind)


LIBRARIES = tuple(dict.fromkeys(library_of(Activation(name), kind) for kind in KINDS for name in ACTIVATIONS))
# No -ffast-math: NaN must stay. No contraction: the sign of z must be the same wherever it is computed.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-funswitch-loops",
    "-w",
)
# By the instruction set that PyTorch itself takes on this processor (ATEN_CPU_CAPABILITY limits both).
INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
# Seconds after which a process that waits for another's build makes its own; building twice does no harm.
PATIENCE = 120


class UnavailableError(RuntimeError):
    """The kernels cannot run on this machine; the message says why."""


_lock = threading.Lock()
# What was loaded, or why it could not be.
_loaded: dict[Library, ctypes.CDLL] = {}
_obstacles: dict[Library, str] = {}
_COMMON = Library("relu", "float32")


def load(library: Library = _COMMON) -> ctypes.CDLL:
    """A library, built where it is not in the cache yet.

    Raises: UnavailableError, at every call after the first too.
    """
    with _lock:
        if library not in _loaded and library not in _obstacles:
            try:
                # After torch, whose OpenMP it then shares.
                _loaded[library] = ctypes.CDLL(str(built(library)))
            except (UnavailableError, OSError) as error:
                _obstacles[library] = str(error)
        if library in _obstacles:
            raise UnavailableError(_obstacles[library])
        return _loaded[library]


def obstacle() -> str | None:
    """Why the kernels cannot run in this process, or None where they can: then the most common are built and loaded."""
    if _COMMON not in _loaded:
        try:
            load()
        except UnavailableError as error:
            return str(error)
    return None


def cache_folder() -> Path:
    """``RESFUSED_CACHE``, or resfused in the user's folder for caches."""
    own = os.environ.get("RESFUSED_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfused"


def instruction_set() -> str:
    """The name of what is compiled for: the widest that this processor has and ``INSTRUCTION_SETS`` knows."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in INSTRUCTION_SETS and platform.machine() == "x86_64" else "baseline"


def built(library: Library = _COMMON) -> Path:
    """The path of a library for this machine; compiles it where it is not in the cache.

    Raises: UnavailableError with the reason.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UnavailableError(
            f"they are for Linux on x86_64 or aarch64, and this is {sys.platform} on {platform.machine()}"
        )
    compiler = _compiler()
    flags = (*FLAGS, *INSTRUCTION_SETS.get(instruction_set(), ()))
    folder = cache_folder()
    path = folder / f"{library.activation}-{library.kind}-{_key(compiler, flags)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(path.with_suffix(".lock")):
            if not path.exists():
                _build(library, _plan(compiler, (*flags, *library.flags)), path)
    except OSError as error:
        raise UnavailableError(f"they cannot be built into {folder}: {error}") from error
    return path


def _compiler() -> list[str]:
    """The command of a C++ compiler: ``CXX``, or the first one found."""
    asked = shlex.split(os.environ.get("CXX", ""))
    names = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
    for name, *rest in names:
        found = shutil.which(name)
        if found is not None:
            return [found, *rest]
    raise UnavailableError(f"no C++ compiler was found: {' or '.join(n[0] for n in names)}")


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ModuleNotFoundError:
        BIN_DIR = None
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise UnavailableError("ninja was not found, which builds them")
    return found


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """A hash of all that the libraries depend on."""
    version = _output([*compiler, "--version"])
    parts = [platform.machine(), instruction_set(), *compiler, version, *flags]
    for source in sorted(SOURCES.rglob("*.*")):
        parts += [source.name, source.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _build(library: Library, plan: str, path: Path) -> None:
    """Compiles and links elsewhere, and puts the whole library at ``path`` in one step."""
    ninja = _ninja()
    kernels = f"the kernels of {library.activation} in {library.kind} for this CPU"
    print(f"resfused: compiling {kernels} into {path.parent}, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="resfused-") as folder:
        (Path(folder) / "build.ninja").write_text(plan)
        _output([ninja, "-C", folder])
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            shutil.copy(Path(folder) / "library.so", partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _plan(compiler: list[str], flags: tuple[str, ...]) -> str:
    """build.ninja."""
    lines = [
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(flags)}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "rule link",
        "  command = $cxx $flags -shared $in -o $out",
        *(f"build {unit}.o: compile {_escaped(SOURCES / unit)}" for unit in UNITS),
        f"build library.so: link {' '.join(f'{unit}.o' for unit in UNITS)}",
        "default library.so",
        "",
    ]
    return "\n".join(lines)


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _output(command: list[str]) -> str:
    """What a command prints; its last words in an UnavailableError where it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise UnavailableError(f"{command[0]} could not be started: {error}") from error
    if done.returncode != 0:
        words = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise UnavailableError(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{words}")
    return done.stdout


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Holds a lock on a file, which the system takes from a process that dies; after ``PATIENCE`` goes on without."""
    import fcntl

    with path.open("w") as file:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                # A file system without locks.
                break
        yield
