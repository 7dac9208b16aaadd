"""What ``benchmarks/count/ceilings.py`` says that a kernel can reach, against the arithmetic done by hand."""

from __future__ import annotations

import pytest
from count.ceilings import (
    ARCHITECTURES,
    CARDS,
    ISSUE,
    KIB,
    Card,
    Work,
    arithmetic,
    ceiling,
    pipe_counts,
    resident_programs,
)

# 132 multiprocessors of 128 lanes at 1 GHz issue 16.9e12 instructions a second.
CARD = Card("sm_90", 1.0, 3.0, 32 * KIB)
WORK = Work(instructions=4.0, pipes={"ALU": 1.0, "FMA": 2.0}, moved=2.0, in_flight=64 * KIB, waves=2.0)
ISSUED = 132 * 128e9 / 1e12


def test_pipes_of_instructions() -> None:
    opcodes = {
        "FMA": "IMAD.MOV.U32 IMAD.WIDE FADD.FTZ FFMA HFMA2.MMA.BF16_V2 HADD2.F32",
        "ALU": "IADD3.X VIADD LEA.HI.X ISETP.GE.AND FSETP.GTU.AND FSEL SEL PRMT MOV SHF.L.U32 F2FP.BF16.F32.PACK_AB "
        "I2FP.F32.S32 LOP3.LUT FMNMX",
        "XU": "MUFU.RCP I2F.RP F2I.FTZ.U32.TRUNC.NTZ F2F.F64.F32 POPC",
        "neither": "LDG.E.128 STG.E BRA BAR.SYNC.DEFER_BLOCKING CS2R UIADD3 ULEA S2R SHFL.BFLY LDS.128",
    }
    counts = pipe_counts(opcode for of in opcodes.values() for opcode in of.split())
    assert counts == {pipe: len(of.split()) for pipe, of in opcodes.items() if pipe != "neither"}


@pytest.mark.parametrize(
    ("change", "reached", "limit"),
    [
        ({}, 3.0, "memory"),
        ({"in_flight": 16 * KIB}, 1.5, "in flight"),
        ({"instructions": 16.0}, 2.0 / 16 * ISSUED, "issue"),
        ({"pipes": {"ALU": 12.0}}, 2.0 / 12 * ISSUED / 2, "ALU"),
        ({"pipes": {"XU": 4.0}}, 2.0 / 4 * ISSUED / 8, "XU"),
        # A full wave at 3 TB/s, and half of one with 16 KiB of the 32 in flight: 1.5 waves in the time of 2.
        ({"in_flight": 32 * KIB, "waves": 1.5}, 3.0 * 1.5 / 2, "last wave"),
        # Half the programs still have enough.
        ({"waves": 1.5}, 3.0, "memory"),
        ({"in_flight": 32 * KIB, "waves": 40.5}, 3.0 * 40.5 / 41, "memory"),
        ({"waves": 0.25}, 1.5, "in flight"),
    ],
)
def test_what_binds(change: dict, reached: float, limit: str) -> None:
    found = ceiling(WORK._replace(**change), CARD)
    assert (pytest.approx(found.bandwidth), found.limit) == (reached, limit)


def test_an_a100_multiplies_in_a_narrower_pipe() -> None:
    work = WORK._replace(pipes={"FMA": 4.0})
    assert arithmetic(work, "sm_90", 1.0).limit == "issue"
    assert arithmetic(work, "sm_80", 1.0) == (pytest.approx(2 / 4 * 108 * 64e9 / 1e12), "FMA")


def test_resident_programs() -> None:
    sm_90 = ARCHITECTURES["sm_90"]
    assert resident_programs(sm_90, 4, 32, 0) == 16, "warps"
    assert resident_programs(sm_90, 4, 96, 0) == 5, "registers: 80 in steps of 8 would be 6"
    assert resident_programs(sm_90, 1, 16, 0) == 32, "blocks"
    assert resident_programs(sm_90, 4, 32, 48 * KIB) == 4, "shared memory, with the system's share of each"


def test_cards_are_of_known_architectures() -> None:
    assert ISSUE == 4 * 32
    for card in CARDS.values():
        assert card.architecture in ARCHITECTURES
        # By Little's law: what saturates memory, and the latency that this is at that bandwidth, in microseconds.
        latency = card.saturating * ARCHITECTURES[card.architecture].multiprocessors / card.copy / 1e6
        assert 0.5 < latency < 2
