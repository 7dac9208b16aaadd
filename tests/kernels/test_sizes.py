"""Launches at the edges of size, on tensors without data: every index that is 32 bits wide, grids, work, workspace."""

from __future__ import annotations

import pytest
import torch
from oracle import LAYOUTS
from resfused.kernels.call import NOTHING_BUT_STATISTICS
from resfused.kernels.geometry import Geometry, geometry
from resfused.kernels.gpu import launch_table
from resfused.kernels.gpu.launching import Forward, tile_options
from resfused.kernels.gpu.statistics import partial_statistics

LIMIT = 2**31
ROWS = [(1, 8), (1, 65536), (LIMIT, 1), (LIMIT, 8), (LIMIT - 1, 3)]
PLANES = [(256, 64, side, side) for side in (7, 57, 63, 113, 225, 513)]
CHANNELS = [(256, 1, 56, 56), (1, 65536, 7, 7), (64, 65536, 7, 7), (64, 65536, 33, 33)]
LARGE = [(32, 64, 513, 513), (4096, 64, 256, 128), (1, 32, 512, 512, 512), (3, 2, 2**31), (1, 1, 2**33)]
STRIDED = {"channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}, "contiguous": {}}


def activation(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    memory_format = STRIDED[layout].get(len(shape), torch.contiguous_format)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def span(g: Geometry, positions: int, channels: int) -> int:
    """From the first element of a tile to its last, by the strides of one group."""
    of_position, of_channel = (g.columns, 1) if g.channels_last else (1, g.positions)
    return (positions - 1) * of_position + (channels - 1) * of_channel


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ROWS + PLANES + CHANNELS + LARGE, ids=str)
def test_indices_grids_and_workspace(shape, layout, multiprocessors, monkeypatch) -> None:
    monkeypatch.setattr(launch_table, "MULTIPROCESSORS", multiprocessors)
    launch_table.streaming.cache_clear()
    tile_options.cache_clear()
    for dtype in (torch.bfloat16, torch.float64):
        x = activation(shape, layout, dtype)
        g = geometry(x)
        assert g.numel == x.numel()
        assert g.plane * g.channels == g.columns
        for kernel in ("statistics", "normalise", "reduce", "apply"):
            for norms in (1, 2):
                launch, options = tile_options(kernel, g, torch.promote_types(dtype, torch.float32), x.device, norms)
                blocks = -(-g.positions // launch.block_positions)
                assert launch.grid[0] < LIMIT
                # Tiles are counted, channels numbered and partial results placed in 32 bits.
                assert g.groups * blocks + launch.programs < LIMIT
                assert launch.channel_blocks * launch.block_channels < LIMIT
                assert options["WIDE"] == (span(g, launch.block_positions, launch.block_channels) >= LIMIT)
                # Every program has a step of its own: one without values would have no mean.
                quads = kernel == "statistics"
                if quads and options["BY_GROUPS"]:
                    assert g.groups % 4 == 0
                    steps = g.groups // 4 * blocks
                else:
                    steps = g.groups * -(-blocks // 4) if quads else g.groups * blocks
                assert 1 <= launch.programs <= steps
                if quads:
                    second = NOTHING_BUT_STATISTICS if norms == 2 else None
                    room = partial_statistics(Forward.of("statistics", x, x, NOTHING_BUT_STATISTICS, second), launch)
                    entries, nbytes = room.numel(), room.nbytes
                else:
                    entries = (norms + 1) * launch.programs * g.columns
                    nbytes = entries * 8
                assert entries < LIMIT
                # Small beside the tensors, or small.
                assert nbytes <= max(x.nbytes * norms // 8, 2**25) or g.positions < 256


def test_a_tile_that_spans_2_to_the_31() -> None:
    """The table's own tiles, of a plane of 2^27: 32 channels of it need offsets of 64 bits, and 8 do not."""
    g = geometry(activation((1, 32, 512, 512, 512), "contiguous"))
    assert not launch_table.needs_wide_offsets(g, 64, 16)
    assert launch_table.needs_wide_offsets(g, 64, 32)
    assert not launch_table.needs_wide_offsets(geometry(activation((64, 256, 56, 56), "channels_last")), 2048, 64)


def test_large_planes_are_not_walked_by_columns() -> None:
    """Each position of a column's plane has partial results: with 513 x 513 of them they would be a tensor's size."""
    assert geometry(activation((256, 64, 31, 33), "contiguous")).plane == 31 * 33
    for side in (33, 57, 513):
        assert geometry(activation((256, 64, side, side), "contiguous")).plane == 1
