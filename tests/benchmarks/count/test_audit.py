"""The library's launches, compiled for GPUs that are not there, keep the budgets of ``benchmarks/count/audit.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
import triton
from count import audit, budgets, machine_code, offline
from count.ceilings import CARDS, KIB, Ceiling
from covering import covering
from resfused.kernels.gpu import launch_table
from workloads.nodes import FORMS, resnet50_nodes

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

LOOP = budgets.Loop(
    elements=16,
    loaded=1,
    instructions=6.0,
    pipes={"ALU": 2.0},
    moved=4.0,
    programs=8,
    waves=1.9,
    last_wave=0.9,
    fills=False,
    in_flight=48 * KIB,
    round_trips=1.0,
    arithmetic=Ceiling(8.0, "issue"),
    ceilings={"H100": Ceiling(3.0, "memory"), "H200": Ceiling(4.3, "memory")},
)
GOOD = budgets.Row(
    architecture="sm_90",
    kernel="statistics",
    form="norm+relu",
    phase="training forward",
    dtype="bfloat16",
    layout="channels_last",
    shape=(256, 64, 56, 56),
    hash="",
    grid=(2006,),
    warps=4,
    registers=128,
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
    available=64 * KIB,
    loop=LOOP,
)
BAD = {
    "spill": {"spilled": 16},
    "narrow access": {"narrowest": 64},
    "float atomic": {"float_atomics": 1},
    "float64": {"float64": 1},
    "wide grid": {"grid": (2**31,)},
    "deep grid": {"grid": (1, 65536)},
    "32-bit offsets": {"offset_bits": 32},
    "registers": {"registers": 129},
    "in flight": {"loop": replace(LOOP, in_flight=48 * KIB - 1)},
    "instructions": {"loop": replace(LOOP, instructions=6.1)},
    "instructions of two norms": {
        "form": "norm+add(norm)+relu",
        "loop": replace(LOOP, loaded=2, instructions=14.1),
    },
    "arithmetic": {"loop": replace(LOOP, arithmetic=Ceiling(7.9, "ALU"))},
    "last wave": {"loop": replace(LOOP, last_wave=0.89)},
    "another activation's registers": {"form": "norm+silu", "kernel": "normalise", "registers": 49},
    "another activation's instructions": {
        "form": "norm+silu",
        "kernel": "apply",
        "registers": 40,
        "loop": replace(LOOP, instructions=24.0),
    },
}
NOT_BAD = {
    "no more to be in flight": {"available": 100, "loop": replace(LOOP, in_flight=100)},
    "a program for each tile": {"loop": replace(LOOP, fills=True, waves=0.5, last_wave=0.5)},
    "two norms": {"form": "norm+add(norm)+relu", "loop": replace(LOOP, loaded=2, instructions=14.0)},
    "another kernel": {"kernel": "reduce", "loop": replace(LOOP, instructions=14.0)},
    "float64": {"dtype": "float64", "float64": 9},
    "another card": {"architecture": "sm_80", "registers": 255, "loop": replace(LOOP, instructions=20.0)},
    "another activation": {
        "form": "norm+silu",
        "kernel": "reduce",
        "registers": 40,
        "loop": replace(LOOP, last_wave=0.1),
    },
    "one launch": {"kernel": "forward", "loop": None},
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


EVEN, BOTH_WAYS = (256, 64, 56, 56), (offline.FORWARD, offline.BACKWARD)
ONE_CHANNEL = ((2, 1, 1, 1), (2**13, 1, 2**10, 2**10))
# (architecture, layout, form, phase, shape): every two meet, on shapes with a ragged tile and of an extent of one.
COVERING = covering(
    architecture=audit.DEFAULT_ARCHITECTURES,
    layout=offline.LAYOUTS,
    form=FORMS,
    phase=offline.PHASES,
    shape=(audit.ODD, audit.HUGE, *ONE_CHANNEL),
).args[1]
# (layout, form, phase): every activation forwards and backwards, in one layout or the other.
OTHER_ACTIVATIONS = covering(layout=offline.LAYOUTS, form=offline.OTHER_FORMS, phase=BOTH_WAYS).args[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's, in which what is compiled again is found."""
    return tmp_path_factory.mktemp("cache")


def compiling(program: list[str], cache: Path) -> Any:
    """The JSON that a process prints, which compiles whatever this one does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    command = [sys.executable, *program]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def audited(cases: list[tuple], cache: Path) -> list[dict]:
    """The rows of (architecture, layout, form, phase, shape) in bfloat16, all read back; with what they break."""
    program = (
        "import json, sys; from dataclasses import asdict; from count import audit, budgets;"
        "found = [audit.rows_of(audit.Task(a, 'bfloat16', l, (tuple(s),), (f,), (p,)))"
        " for a, l, f, p, s in json.loads(sys.argv[1])];"
        "rows = [asdict(r) | {'broken': budgets.violations(r, budgets.ALWAYS)} for f in found for r in f.rows];"
        "print(json.dumps([rows, sum((f.unread for f in found), [])]))"
    )
    rows, unread = compiling(["-c", program, json.dumps(cases)], cache)
    assert unread == []
    return rows


def broken(rows: list[dict]) -> set[tuple]:
    names = ("kernel", "architecture", "form", "phase", "layout")
    return {(*(row[name] for name in names), str(row["shape"]), v) for row in rows for v in row["broken"]}


def test_budgets_hold(cache: Path) -> None:
    rows = audited(list(product(["sm_90"], offline.LAYOUTS, FORMS, BOTH_WAYS, [EVEN])), cache)
    streaming = {kernel for kernel, _ in launch_table.STREAMING}
    assert {row["kernel"] for row in rows if row["loop"]} == streaming
    assert {row["kernel"] for row in rows if row["least_width"] == 128} == streaming
    assert broken(rows) == set()
    for row in rows:
        if loop := row["loop"]:
            # As many steps are on their way as there are to a round trip.
            steps = max(1, 1 / loop["round_trips"])
            threads = loop["programs"] * row["warps"] * 32
            assert 0 < loop["in_flight"] <= threads * loop["elements"] * loop["moved"] * steps
            assert 0 < loop["pipes"]["ALU"] < loop["instructions"] < 50
            assert all(0 < bandwidth <= CARDS[card].copy for card, (bandwidth, _) in loop["ceilings"].items())


def test_other_activations_hold(cache: Path) -> None:
    rows = audited([("sm_90", *case, EVEN) for case in OTHER_ACTIVATIONS], cache)
    assert broken(rows) == set()
    of_their_own = {(row["form"], row["kernel"]) for row in rows if row["loop"] and row["kernel"] != "statistics"}
    assert of_their_own == budgets.OTHERS.keys()


def test_other_cards_and_shapes_compile(cache: Path) -> None:
    assert broken(audited(COVERING, cache)) == set()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_loops_counted_by_hand(architecture: str, cache: Path) -> None:
    single, staged, pairs = compiling([str(Path(__file__).with_name("loop_kernels.py")), architecture], cache)
    of_a_copy = {"elements": 16, "loaded": 1, "moved": 4, "bytes": 32}
    assert single.items() >= {**of_a_copy, "first": 32, "round_trips": 1}.items()
    # Of three stages, two tiles are on their way when the oldest is waited for.
    assert staged.items() >= {**of_a_copy, "first": 64, "round_trips": 0.5}.items()
    # The loop of pairs, not that of what is left over.
    assert pairs.items() >= {"elements": 32, "loaded": 2, "moved": 4, "bytes": 128}.items()
    assert pairs["first"] * pairs["round_trips"] >= pairs["bytes"]
    for kernel in (single, staged, pairs):
        assert 10 < kernel["instructions"] < kernel["all"]
        assert 8 <= kernel["registers"] <= 128
        assert (kernel["spilled"], kernel["offset_bits"], kernel["narrowest"]) == (0, 64, 128)


@pytest.mark.parametrize("change", [{}, *NOT_BAD.values()], ids=["good", *NOT_BAD])
def test_a_good_row_breaks_nothing(change: dict) -> None:
    assert budgets.violations(replace(GOOD, **change)) == []


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_row_breaks_its_budget(change: dict) -> None:
    assert len(budgets.violations(replace(GOOD, **change))) == 1


def test_the_worst_of_rows() -> None:
    rows = [replace(GOOD, registers=n, loop=replace(LOOP, last_wave=w)) for n, w in ((40, 0.5), (200, 0.7), (80, 1.0))]
    by_name = {b.what: budgets.worst(b, rows) for b in budgets.BUDGETS}
    assert by_name["registers of a thread"] == (200, rows[1])
    assert by_name["how full the last wave is"] == (0.5, rows[0])
    assert budgets.worst(budgets.BUDGETS[0], []) is None


def test_a_step_is_the_launches_of_every_node() -> None:
    nodes = resnet50_nodes()
    phases = (offline.FORWARD, offline.FORKED), (offline.FORWARD, offline.BACKWARD)
    cases = {(n.form, phase, (256, n.channels, n.height, n.width)) for n in nodes for phase in phases[not n.forked]}
    rows = [
        replace(GOOD, form=form, phase=phase, shape=shape, hash=f"{form} {phase} {launch}")
        for form, phase, shape in cases
        for launch in range(2)
    ]
    fills = Counter({("sm_90", "channels_last", FORMS[0], offline.FORWARD, (256, 64, 112, 112)): 1})
    forms = {(n.form, phase) for n in nodes for phase in phases[not n.forked]}
    (step,) = audit.steps_of(audit.Audit(rows, [], fills))
    assert step == ("sm_90", "channels_last", 4 * 49 + 1, 2 * len(forms))
    assert [n > most for _, n, most in step.counts] == [True, False]
    assert audit.steps_of(audit.Audit(rows[2:], [], fills)) == [], "not all of it is there"
    assert audit.steps_of(audit.Audit(rows, ["one"], fills)) == [], "not all of it was read"


def test_fills_are_launches() -> None:
    x = torch.empty(8, device="meta")
    with offline.Fills() as fills:
        x.new_empty(4), x.new_zeros(4), x.zero_(), x.copy_(x), x.view(2, 4), torch.empty_like(x), x.clone()
    assert fills.launches == 4


@pytest.mark.parametrize("kind", SASS)
def test_kind_of_an_instruction(kind: str) -> None:
    for opcode in SASS[kind]:
        assert bool(machine_code.FLOAT_ATOMIC.match(opcode)) == (kind == "float_atomics"), opcode
        assert bool(machine_code.FLOAT64.search(opcode)) == (kind == "float64"), opcode


@pytest.mark.parametrize("lines", ASSEMBLY)
def test_a_load_is_of_the_line_where_its_assembly_begins(lines: str) -> None:
    transfers = machine_code.transfers_of(ASSEMBLY[lines] + NEIGHBOUR + FILES)
    assert transfers == [(True, 128, ("kernel.py", 80), False), (True, 32, ("kernel.py", 83), False)]
    wide, narrow = (machine_code.Access(True, (64, 64), 2, 64, ("kernel.py", line)) for line in (80, 83))
    assert machine_code.narrowest([wide], transfers) == 128
    assert machine_code.narrowest([wide, narrow], transfers) == 32


def test_what_cannot_be_read_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    access = machine_code.Access(True, (64, 64), 2, 64, ("kernel.py", 80))
    with pytest.raises(machine_code.UnreadableError, match=r"load in line 80 of kernel\.py"):
        machine_code.narrowest([access], [machine_code.Transfer(True, 128, ("kernel.py", 83))])
    with pytest.raises(machine_code.UnreadableError, match="no access to a tile"):
        machine_code.tile_accesses("")
    monkeypatch.setattr(
        audit, "audit", lambda tasks, console: audit.Audit([GOOD], ["sm_90 normalise: [why]"], Counter())
    )
    assert audit.run(commands.parser("").parse_args(["audit", "--short"])) == 0
    said = capsys.readouterr().out
    assert "0 launches and 0 counts over budget" in said
    assert f"1 launches more not judged: what Triton {triton.__version__} makes" in said
    assert "sm_90 normalise: [why]" in said


def test_what_is_over_budget_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    bad = replace(GOOD, registers=200)
    monkeypatch.setattr(audit, "audit", lambda tasks, console: audit.Audit([GOOD, bad], [], Counter()))
    assert audit.run(commands.parser("").parse_args(["audit", "--short"])) == 1
    assert "1 launches and 0 counts over budget" in capsys.readouterr().out
