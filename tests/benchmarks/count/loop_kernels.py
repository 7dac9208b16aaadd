"""Kernels whose inner loops can be counted by hand, compiled and read back: ``python loop_kernels.py ARCHITECTURE``.

A tile of 32 by 64 bfloat16 numbers is 16 of them for each of 128 threads, so 32 bytes.
"""

import json
import sys

import torch
import triton
import triton.language as tl
from count import machine_code, offline

ROWS, COLUMNS = 32, 64


@triton.jit
def copy(x, y, tiles, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr):
    local = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * (R * C)
        tl.store(y + start + local, tl.load(x + start + local) * 2)


@triton.jit
def sum_pairs(x, y, sums, tiles, R: tl.constexpr, C: tl.constexpr):
    """Two tiles of each of two tensors a step, and the tiles that are left one by one."""
    local = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    total = tl.zeros((R, C), tl.float32)
    whole = tiles // 2
    for pair in range(tl.program_id(0), whole, tl.num_programs(0)):
        start = tl.cast(pair, tl.int64) * (2 * R * C)
        for_both = start + R * C
        a = tl.load(x + start + local)
        b = tl.load(y + start + local)
        c = tl.load(x + for_both + local)
        d = tl.load(y + for_both + local)
        total += a.to(tl.float32) * b + c.to(tl.float32) * d
    for tile in range(2 * whole + tl.program_id(0), tiles, tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * (R * C)
        total += tl.load(x + start + local).to(tl.float32) * tl.load(y + start + local)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(launch):
    accesses = machine_code.tile_accesses(launch.kernel.asm["ttir"])
    code = machine_code.read_back(launch.kernel, accesses)
    step = machine_code.step_of(accesses, code)
    loop = code.loop
    return {
        **step._asdict(), "bytes": loop.loaded, "first": loop.first, "round_trips": loop.round_trips,
        "instructions": len(loop.opcodes), "all": len(code.opcodes), "spilled": code.spilled,
        "registers": code.registers, "offset_bits": min(a.offset_bits for a in accesses),
        "narrowest": machine_code.narrowest(accesses, code.transfers),
    }  # fmt: skip


def main(architecture):
    x, y, sums = (torch.empty(2**16, dtype=dtype, device="meta") for dtype in (torch.bfloat16,) * 2 + (torch.float32,))
    with offline.compiling_for(architecture) as launches:
        copy[(8,)](x, y, 32, R=ROWS, C=COLUMNS, STAGES=1)
        copy[(8,)](x, y, 32, R=ROWS, C=COLUMNS, STAGES=3)
        sum_pairs[(8,)](x, y, sums, 32, R=ROWS, C=COLUMNS)
    print(json.dumps([read(launch) for launch in launches]))


if __name__ == "__main__":
    main(sys.argv[1])
