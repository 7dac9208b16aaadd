"""The build of the C++ kernels: when it happens, once among many processes, and what happens where it cannot."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resfused.kernels import cpu
from resfused.kernels.activation import Activation
from resfused.kernels.cpu import build, functions

import resfused

TESTS = Path(__file__).parent
# The calls of a compiler for one.
A_LIBRARY = len(build.UNITS) + 1
BACKEND = "import torch, resfused; print(resfused.backend_for(torch.ones(2, 3)))"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels in C++ are for Linux")


@pytest.fixture(scope="module")
def library():
    """The library of this machine, as the other tests have it."""
    return build.built()


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RESFUSED_BACKEND", "CXX")}
    kept["PYTHONPATH"] = os.pathsep.join(map(str, (Path(resfused.__file__).parent.parent, TESTS, TESTS.parent)))
    return kept | {name: str(value) for name, value in changes.items()}


def python(*arguments, **changes):
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**changes), cwd="/", capture_output=True, text=True
    )


@pytest.fixture
def compiler(tmp_path, library):
    """A command that behaves as a compiler, says what it was asked in a log, and links what was compiled before."""

    def make(before=""):
        path = tmp_path / "compiler"
        path.write_text(f"""#!/bin/sh
case "$*" in *--version) echo stand-in; exit;; esac
echo "$@" >> {tmp_path}/log
{before}
for last; do :; done
case "$*" in *-shared*) cp {library} "$last";; *) : > "$last";; esac
""")
        path.chmod(0o755)
        return path

    return make


def compiled(tmp_path):
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_only_the_first_call_builds(tmp_path, compiler):
    settings = {"CXX": compiler(), "RESFUSED_CACHE": tmp_path / "cache"}
    fused = (
        "import resfused; from torch import nn;"
        "print(resfused.fuse_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))"
    )
    imported = python("-c", fused, **settings)
    assert imported.returncode == 0, imported.stderr
    assert not imported.stderr
    assert not compiled(tmp_path)
    first = python("-c", BACKEND, **settings)
    assert (first.stdout.strip(), first.stderr.count("\n")) == ("native", 1)
    assert f"compiling the kernels of relu in float32 for this CPU into {tmp_path / 'cache'}, once" in first.stderr
    assert len(compiled(tmp_path)) == A_LIBRARY
    second = python("-c", BACKEND, **settings)
    assert (second.stdout.strip(), second.stderr) == ("native", "")
    assert len(compiled(tmp_path)) == A_LIBRARY


CALLS = """
from resfused.kernels.activation import RELU, Activation
from resfused.kernels.cpu import build
for kind in build.KINDS:
    for activation in (RELU, Activation("relu6"), Activation("silu"), RELU):
        try:
            build.load(build.library_of(activation, kind))
        except build.UnavailableError as error:
            print(activation.name, kind, "no such luck" in str(error))
"""


def test_libraries_are_built_each_at_its_first_call(tmp_path, compiler):
    called = python("-c", CALLS, CXX=compiler(), RESFUSED_CACHE=tmp_path / "cache")
    assert (called.stdout, called.stderr.count("\n")) == ("", 10)
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").glob("*.so")) == [
        "any-mixed", "any-wide", "relu-bfloat16", "relu-float32", "relu-mixed", "relu-wide",
        "relu6-bfloat16", "relu6-float32", "silu-bfloat16", "silu-float32",
    ]  # fmt: skip
    assert len(compiled(tmp_path)) == 10 * A_LIBRARY
    for flags in ("-DACTIVATION=kRelu6 -DKIND=Float32Kind", "-DACTIVATION=kAny -DKIND=WideKind -O1"):
        assert sum(flags in line for line in compiled(tmp_path)) == A_LIBRARY


def test_libraries_fail_alone(tmp_path, compiler):
    """With the same reason at every call; the others go on."""
    broken = compiler('case "$*" in *kRelu6*|*kAny*Wide*) echo "no such luck"; exit 3;; esac')
    called = python("-c", CALLS, CXX=broken, RESFUSED_CACHE=tmp_path / "cache")
    assert called.stdout.splitlines() == [
        f"{name} True" for name in ("relu6 float32", "relu6 bfloat16", "relu6 wide", "silu wide")
    ]


def test_calls_take_what_is_compiled_for_them(monkeypatch):
    taken, load = [], build.load
    monkeypatch.setattr(build, "load", lambda name: (taken.append(tuple(name)), load(name))[1])
    functions._library.cache_clear()
    for activation, x, residual in (
        ("relu", torch.float32, torch.float32),
        ("silu", torch.bfloat16, torch.bfloat16),
        ("silu", torch.float16, torch.float16),
        ("silu", torch.bfloat16, torch.float32),
        ("relu", torch.float16, torch.float64),
    ):
        one = torch.ones(2, dtype=x)
        norm = cpu.Norm(one, one, one, one, 0.1, 0.1)
        call = Activation(activation)
        cpu.forward(torch.ones(4, 2, dtype=x), torch.ones(4, 2, dtype=residual), norm, None, True, False, call)
    assert taken == [("relu", "float32"), ("silu", "bfloat16"), ("any", "mixed"), ("relu", "wide")]


def test_four_processes_build_once(tmp_path, compiler):
    settings = environment(CXX=compiler("sleep 0.05"), RESFUSED_CACHE=tmp_path / "cache")
    work = [
        subprocess.Popen([sys.executable, "-c", BACKEND], env=settings, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in work] == ["native"] * 4
    assert len(compiled(tmp_path)) == A_LIBRARY
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".lock", ".so"]


def test_a_killed_build_leaves_no_lock(tmp_path, compiler):
    settings = {"RESFUSED_CACHE": tmp_path / "cache", "CXX": compiler("sleep 60")}
    killed = subprocess.Popen([sys.executable, "-c", BACKEND], env=environment(**settings), start_new_session=True)
    end = time.monotonic() + 60
    while not compiled(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    compiler()
    assert python("-c", BACKEND, **settings).stdout.strip() == "native"


def test_a_compiler_that_fails_half_way(tmp_path, compiler):
    cache = tmp_path / "cache"
    broken = compiler('case "$*" in *forward.cpp*) echo "no such luck"; exit 3;; esac')
    automatic = python("-c", BACKEND, CXX=broken, RESFUSED_CACHE=cache)
    assert automatic.stdout.strip() == "torch"
    assert automatic.stderr.count("plain PyTorch operators run on the CPU") == 1
    assert "no such luck" in automatic.stderr
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]
    assert python("-c", BACKEND, CXX=compiler(), RESFUSED_CACHE=cache).stdout.strip() == "native"


UNABLE = """
import torch
{before}
import resfused
block = resfused.ResidualBlock(4)
for _ in range(2):
    block(torch.randn(2, 4, 5, 5)).sum().backward()
print(resfused.backend_for(torch.ones(2, 3)), block.conv1.weight.grad.shape)
resfused.set_backend("native")
resfused.backend_for(torch.ones(2, 3))
"""


@pytest.mark.parametrize(
    ("reason", "changes", "before"),
    [
        ("no C++ compiler was found", {"PATH": "/nowhere"}, ""),
        ("no C++ compiler was found: lost-compiler", {"CXX": "lost-compiler -O1"}, ""),
        ("they cannot be built into /dev/null/cache", {"RESFUSED_CACHE": "/dev/null/cache"}, ""),
        ("for Linux on x86_64 or aarch64, and this is darwin", {}, "import sys; sys.platform = 'darwin'"),
        ("and this is linux on riscv64", {}, "import platform; platform.machine = lambda: 'riscv64'"),
    ],
    ids=["no compiler", "no such compiler", "no cache", "another system", "another processor"],
)
def test_where_nothing_can_be_built(reason, changes, before):
    """One warning that says why, and plain operators; the same reason where the kernels are forced."""
    done = python("-c", UNABLE.format(before=before), **changes)
    assert done.stdout.strip() == "torch torch.Size([4, 4, 3, 3])"
    assert done.stderr.count("plain PyTorch operators run on the CPU") == 1
    assert done.stderr.count(reason) == 2
    assert "RuntimeError: the backend 'native' was forced, but input needs kernels that cannot be had" in done.stderr


def test_the_library_depends_on_what_it_was_made_of(tmp_path, compiler, monkeypatch):
    own = [str(compiler())]
    key = build._key(own, build.FLAGS)
    assert key == build._key(own, build.FLAGS)
    assert build._key([*own, "-O1"], build.FLAGS) != key
    assert build._key(own, (*build.FLAGS, "-g")) != key
    monkeypatch.setattr(build, "instruction_set", lambda: "another")
    assert build._key(own, build.FLAGS) != key
    monkeypatch.undo()
    copied = shutil.copytree(build.SOURCES, tmp_path / "source")
    monkeypatch.setattr(build, "SOURCES", copied)
    assert build._key(own, build.FLAGS) == key
    (copied / "packs" / "pack.h").write_text("")
    assert build._key(own, build.FLAGS) != key


def test_building_ahead(tmp_path, compiler):
    ahead = python("-m", "resfused.build", CXX=compiler(), RESFUSED_CACHE=tmp_path / "cache")
    assert ahead.returncode == 0
    libraries = [Path(line) for line in ahead.stdout.split()]
    assert len(libraries) == len(build.LIBRARIES)
    assert all(path.parent == tmp_path / "cache" and path.exists() for path in libraries)
    failed = python("-m", "resfused.build", CXX="lost-compiler")
    assert failed.returncode == 1
    assert "no C++ compiler was found: lost-compiler" in failed.stderr


def covers(capability, *flags, **changes):
    """The covering set, on a library compiled for less than this processor and with ``flags``."""
    done = python(
        str(TESTS / "native_cases.py"), "-O1", "-fno-unswitch-loops", *flags, ATEN_CPU_CAPABILITY=capability, **changes
    )
    assert done.stdout.strip().endswith("whole"), done.stderr[-4000:]


def test_nothing_is_undefined():
    """Under UndefinedBehaviorSanitizer, in AVX2 where the processor has it."""
    covers("avx2", "-fsanitize=undefined", "-fno-sanitize-recover=all")


def test_every_access_is_inside():
    """Under AddressSanitizer, on the instruction set that every processor has."""
    asked = [*build._compiler(), "-print-file-name=libasan.so"]
    preloaded = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not Path(preloaded).is_absolute():
        pytest.skip(f"{asked[0]} has no libasan.so")
    covers("default", "-fsanitize=address", LD_PRELOAD=preloaded, ASAN_OPTIONS="detect_leaks=0")


def test_every_unit_is_in_the_package():
    assert set(build.UNITS) == {str(p.relative_to(build.SOURCES)) for p in build.SOURCES.rglob("*.cpp")}
