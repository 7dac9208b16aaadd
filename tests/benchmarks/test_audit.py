"""The library's launches, compiled for GPUs that are not there, keep the budgets of ``benchmarks/audit.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import triton
from count import audit, machine_code

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

GOOD = audit.Row(
    architecture="sm_90",
    kernel="normalise",
    form="norm+relu",
    phase="training forward",
    dtype="bfloat16",
    layout="channels_last",
    shape=(256, 64, 56, 56),
    hash="",
    grid=(8192,),
    warps=4,
    registers=64,
    spilled=0,
    shared=0,
    instructions=200,
    loads={128: 1},
    stores={128: 1},
    float_atomics=0,
    float64=0,
    narrowest=128,
    least_width=128,
    offset_bits=64,
    resident_warps=32,
    in_flight=audit.IN_FLIGHT,
    available=2 * audit.IN_FLIGHT,
)
BAD = {
    "spill": {"spilled": 16},
    "narrow access": {"narrowest": 64},
    "float atomic": {"float_atomics": 1},
    "float64": {"float64": 1},
    "in flight": {"in_flight": audit.IN_FLIGHT - 1},
    "wide grid": {"grid": (2**31,)},
    "deep grid": {"grid": (1, 65536)},
    "32-bit offsets": {"offset_bits": 32},
}
WIDTHS = {
    "LDG.E.128": (128, 0),
    "LDG.E.64.CONSTANT": (64, 0),
    "LDG.E.LTC128B": (32, 0),
    "LDG.E.U16.CONSTANT": (16, 0),
    "STG.E.U8": (0, 8),
    "STG.E.ENL2.256": (0, 256),
    "STS.128": (0, 0),
    "buffer_load_dwordx4": (128, 0),
    "global_load_ushort": (16, 0),
    "buffer_store_byte": (0, 8),
}
SASS = {
    "float_atomics": [
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU",
        "ATOMG.E.ADD.F16x2.RN.STRONG.GPU",
        "REDG.E.ADD.F32.STRONG.GPU",
    ],
    "float64": ["DADD", "DFMA.RM", "DSETP.NEU.AND", "MUFU.RCP64H", "F2F.F64.F32", "I2F.F64.U32"],
    "neither": [
        "ATOMG.E.ADD.STRONG.GPU",
        "REDUX.SUM",
        "FADD",
        "MUFU.RSQ",
        "DEPBAR.LE",
        "F2F.BF16.F32",
        "F2FP.BF16.F32",
    ],
}

WIDE = "@%p1 ld.global.L1::evict_first.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"
ASSEMBLY = {
    "one line": ".loc 1 80 9\n// begin inline asm\nmov.u32 %r1, 0x0;\n" + WIDE + "\n// end inline asm\n",
    "counted lines": ".loc 1 80 9\n// begin inline asm\n"
    + "".join(f".loc 1 {line} 9\nmov.u32 %r{line - 79}, 0x0;\n" for line in (80, 81, 82, 83))
    + WIDE
    + "\n// end inline asm\n",
}
NARROW = "@%p1 ld.global.b32 { %r5 }, [ %rd2 + 0 ];"
NEIGHBOUR = "// begin inline asm\n.loc 1 83 9\nmov.u32 %r5, 0x0;\n" + NARROW + "\n// end inline asm\n"
FILES = '.file 1 "kernel.py"\n'


def compiled(architecture: str, shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> list[audit.Row]:
    """The rows of both layouts in bfloat16, all read back, from a process that compiles whatever this one does."""
    program = (
        "import json, sys; from dataclasses import asdict; from count import audit;"
        "architecture, shapes = json.loads(sys.argv[1]);"
        "tasks = [audit.Task(architecture, 'bfloat16', l, tuple(map(tuple, shapes))) for l in audit.LAYOUTS];"
        "rows, unread = (sum(part, []) for part in zip(*map(audit.rows_of, tasks)));"
        "print(json.dumps([[asdict(row) for row in rows], unread]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    out = subprocess.run(
        [sys.executable, "-c", program, json.dumps([architecture, shapes])],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    rows, unread = json.loads(out)
    assert unread == []
    return [audit.Row(**row | {"shape": tuple(row["shape"])}) for row in rows]


def broken(rows: list[audit.Row]) -> set[tuple[str, ...]]:
    return {(r.kernel, r.form, r.phase, r.layout, str(r.shape), v) for r in rows for v in audit.violations(r)}


@pytest.mark.parametrize("architecture", audit.DEFAULT_ARCHITECTURES)
def test_budgets_hold(architecture: str, tmp_path: Path) -> None:
    shapes = ((256, 64, 56, 56), (256, 130, 28, 28), audit.HUGE)
    rows = compiled(architecture, shapes if architecture == "sm_90" else shapes[:1], tmp_path)
    streaming = {kernel for kernel, _ in audit.launch_table.STREAMING}
    assert {r.kernel for r in rows if r.available} == streaming
    assert {r.kernel for r in rows if r.least_width == 128} == streaming
    assert {r.kernel for r in rows if r.available and r.offset_bits == 64} == streaming
    assert broken(rows) == set()


def test_extents_of_one_and_beyond_32_bits_compile(tmp_path: Path) -> None:
    rows = compiled("sm_90", ((4, 1, 9, 9), (2, 1, 1, 1), (2**13, 1, 2**10, 2**10)), tmp_path)
    assert broken(rows) == set()


def test_a_good_row_breaks_nothing() -> None:
    assert audit.violations(GOOD) == []


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_row_breaks_its_budget(change: dict) -> None:
    assert len(audit.violations(replace(GOOD, **change))) == 1


def test_float64_is_for_float64_activations() -> None:
    assert audit.violations(replace(GOOD, dtype="float64", float64=9)) == []


def test_a_small_shape_needs_no_more_than_it_has() -> None:
    assert audit.violations(replace(GOOD, in_flight=100, available=100)) == []


@pytest.mark.parametrize("opcode", WIDTHS)
def test_width_of_an_instruction(opcode: str) -> None:
    assert (machine_code.width_of(opcode, True), machine_code.width_of(opcode, False)) == WIDTHS[opcode]


@pytest.mark.parametrize("kind", SASS)
def test_kind_of_an_instruction(kind: str) -> None:
    for opcode in SASS[kind]:
        assert bool(machine_code.FLOAT_ATOMIC.match(opcode)) == (kind == "float_atomics"), opcode
        assert bool(machine_code.FLOAT64.search(opcode)) == (kind == "float64"), opcode


@pytest.mark.parametrize("lines", ASSEMBLY)
def test_a_load_is_of_the_line_where_its_assembly_begins(lines: str) -> None:
    transfers = machine_code.transfers_of(ASSEMBLY[lines] + NEIGHBOUR + FILES)
    assert transfers == [(True, 128, ("kernel.py", 80)), (True, 32, ("kernel.py", 83))]
    wide, narrow = (machine_code.Access(True, 4096, 2, 64, ("kernel.py", line)) for line in (80, 83))
    assert machine_code.narrowest([wide], transfers) == 128
    assert machine_code.narrowest([wide, narrow], transfers) == 32


def test_what_cannot_be_read_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    access = machine_code.Access(True, 4096, 2, 64, ("kernel.py", 80))
    with pytest.raises(machine_code.UnreadableError, match=r"load in line 80 of kernel\.py"):
        machine_code.narrowest([access], [machine_code.Transfer(True, 128, ("kernel.py", 83))])
    with pytest.raises(machine_code.UnreadableError, match="no access to a tile"):
        machine_code.tile_accesses("")
    monkeypatch.setattr(audit, "audit", lambda tasks, console: audit.Audit([GOOD], ["sm_90 normalise: [why]"]))
    assert audit.run(commands.parser("").parse_args(["audit", "--short"])) == 0
    said = capsys.readouterr().out
    assert f"1 launches more not judged: what Triton {triton.__version__} makes" in said
    assert "sm_90 normalise: [why]" in said
