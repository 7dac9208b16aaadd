"""What ``benchmarks/count/inner_loop.py`` reads in machine code, against loops that are counted by hand."""

from __future__ import annotations

import pytest
from count.inner_loop import UnreadableError, inner_loop, innermost, instructions, width_of

WIDTHS = {
    "LDG.E.128": (128, 0),
    "LDG.E.64.CONSTANT": (64, 0),
    "LDG.E.LTC128B": (32, 0),
    "LDG.E.U16.CONSTANT": (16, 0),
    "LDGSTS.E.BYPASS.LTC128B.128": (128, 0),
    "LDGDEPBAR": (0, 0),
    "STG.E.U8": (0, 8),
    "STG.E.ENL2.256": (0, 256),
    "STS.128": (0, 0),
    "buffer_load_dwordx4": (128, 0),
    "global_load_ushort": (16, 0),
    "buffer_store_byte": (0, 8),
}
FIRST = "LDG.E.128 R4, desc[UR4][R2.64]"
SECOND = "@P0 LDG.E.128 R8, desc[UR4][R2.64+0x800]"
USE, USE_SECOND = "FADD R0, R0, R7", "FADD R0, R0, R8"
COPY, GROUP = "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], !P0", "LDGDEPBAR"
# (steps, (bytes a thread loads, bytes in flight at the first wait, round trips)), each in its order of issue.
LOOPS = {
    "both before the first use": ([FIRST, SECOND, USE, USE_SECOND], (32, 32, 1)),
    "one after the other": ([FIRST, USE, SECOND, USE_SECOND], (32, 16, 2)),
    "a third after the first use": ([FIRST, SECOND, USE, FIRST.replace("R4", "R12"), "MOV R1, R12"], (48, 32, 2)),
    # While one step's first is used, its second and the next step's first are on their way.
    "loads of the next step": (["MOV R12, R4", FIRST, "FADD R0, R0, R12"], (16, 16, 1)),
    "overwritten before it is there": ([FIRST, "MOV R4, RZ"], (16, 16, 1)),
    "a wide store of what was loaded": ([FIRST, "STG.E.128 desc[UR4][R10.64], R4"], (16, 16, 1)),
    "a store of other registers": ([FIRST, "STG.E.64 desc[UR4][R10.64], R8", USE], (16, 16, 1)),
    "two quadruples": (["LDG.E.ENL2.256 R12, R4, desc[UR4][R2.64]", "MOV R0, R15", USE], (32, 32, 1)),
    "two copies kept in flight": (["DEPBAR.LE SB0, 0x1", "LDS.128 R12, [R9]", COPY, GROUP], (16, 32, 0.5)),
    "three copies kept in flight": (["DEPBAR.LE SB0, 0x2", COPY, GROUP], (16, 48, 1 / 3)),
    "two tensors, one stage ahead": (["DEPBAR.LE SB0, 0x2", COPY, GROUP, COPY, GROUP], (32, 64, 0.5)),
    "no copy is kept": ([COPY, GROUP, "DEPBAR.LE SB0, 0x0"], (16, 16, 1)),
}


def listing(body: list[str]) -> str:
    """As the disassembler prints a kernel whose only loop is ``body``, with a trap behind its end."""
    lines = ["MOV R1, c[0x0][0x28]", "label .L_x_0", *body, "@!P0 BRA `(.L_x_0)", "EXIT", "label .L_x_1"]
    lines += ["BRA `(.L_x_1)", "NOP"]
    return "\n".join(
        f"{line.removeprefix('label ')}:" if line.startswith("label") else f"        /*{16 * i:04x}*/      {line} ;"
        for i, line in enumerate(lines)
    )


@pytest.mark.parametrize("opcode", WIDTHS)
def test_width_of_an_instruction(opcode: str) -> None:
    assert (width_of(opcode, True), width_of(opcode, False)) == WIDTHS[opcode]


@pytest.mark.parametrize("case", LOOPS)
def test_pace_of_a_loop(case: str) -> None:
    body, expected = LOOPS[case]
    loop = inner_loop(instructions(listing(body)))
    assert len(loop.opcodes) == len(body) + 1
    assert (loop.loaded, loop.first, pytest.approx(loop.round_trips)) == expected


def test_the_inner_loop_is_the_innermost_that_loads_the_most() -> None:
    # Loops 0-9 around 1-3 and 5-8, in which 6 goes on at 5 too; 11-12 loads nothing.
    branches = [(9, 0), (3, 1), (6, 5), (8, 5), (12, 11), (2, 7)]
    loads = {2: 4, 7: 16}

    def loaded(loop: range) -> int:
        return sum(loads.get(i, 0) for i in loop)

    assert innermost(branches, loaded) == range(5, 9)
    loads[2] = 32
    assert innermost(branches, loaded) == range(1, 4)
    loads.clear()
    assert innermost(branches, loaded) is None


def test_the_inner_loop_is_the_one_that_streams() -> None:
    """Behind it another may load more, of partial results."""
    loops = [("kernel.py", 70, [FIRST, USE]), ("kernel.py", 90, [FIRST, SECOND, USE, USE_SECOND])]
    lines = [
        line
        for number, (file, at, body) in enumerate(loops)
        for line in (
            f".L_x_{number}:",
            f'        //## File "{file}", line {at} inlined at "caller.py", line 3',
            '        //## File "caller.py", line 3',
            *(f"        /*0000*/      {each} ;" for each in (*body, f"@P0 BRA `(.L_x_{number})")),
        )
    ]
    code = instructions("\n".join(lines))
    assert {each.source for each in code} == {("kernel.py", 70), ("kernel.py", 90)}
    assert inner_loop(code).loaded == 32
    assert inner_loop(code, lambda source: source == ("kernel.py", 70)).loaded == 16


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([USE], "no loop that loads"),
        ([FIRST, "UTMALDG.2D [UR8], [UR4]", USE], "what UTMALDG.2D keeps in flight"),
        ([FIRST.replace("R4", "RZ")], "nothing waits"),
    ],
)
def test_what_is_not_known_is_said(body: list[str], reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        inner_loop(instructions(listing(body)))
