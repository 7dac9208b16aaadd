"""Every element of every output is written, and nothing beside it; nothing is read beside the inputs."""

import pytest
import torch
from covering import LAUNCHES, covering
from oracle import FORMS, LAYOUTS, STATISTICS, problem, run
from resfused.kernels.gpu import launch_table

import resfused.functional as fused

GUARD = 256
POISON = {torch.uint8: 0xA5, torch.int32: 0x5A5A5A5A}


@pytest.fixture
def guarded(monkeypatch):
    """Allocations come poisoned, between two guard zones; returns the buffers (whole, the part handed out)."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    buffers = []

    def allocate(x, size, stride, dtype):
        numel = torch.Size(size).numel()
        whole = new_empty(x, numel + 2 * GUARD, dtype=dtype).fill_(POISON.get(dtype, float("nan")))
        part = whole.as_strided(size, stride, GUARD)
        buffers.append((whole, whole[GUARD : GUARD + numel]))
        return part

    def guarded_empty_like(x, *, dtype=None, **kwargs):
        plain = empty_like(x, dtype=dtype, **kwargs)
        return allocate(x, plain.shape, plain.stride(), plain.dtype)

    def guarded_new_empty(x, size, *, dtype=None, **kwargs):
        size = (size,) if isinstance(size, int) else tuple(size)
        return allocate(x, size, torch.empty(size, device="meta").stride(), dtype or x.dtype)

    monkeypatch.setattr(torch, "empty_like", guarded_empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
    return buffers


def untouched(zone):
    return (zone == POISON[zone.dtype]).all() if zone.dtype in POISON else zone.isnan().all()


@covering(
    form=FORMS, layout=LAYOUTS, training=[True, False], launches=LAUNCHES, indirect=("launches",),
    shape=[(3, 37, 5, 5), (2, 16, 3, 8), (5, 3, 1, 1), (2, 1, 3, 3), (33, 5, 3, 3)],
    together=("layout", "training", "shape"),
)  # fmt: skip
def test_outputs_whole_and_surroundings_untouched(form, layout, training, shape, device, guarded, request, launches):
    for small in (False, True):
        if small:
            request.getfixturevalue("small_launches")
        p = problem(form, shape, torch.float32, device, training=training, layout=layout)
        guarded.clear()
        results = run(fused, p)
        assert len(guarded) >= (4 if training else 3)
        for whole, part in guarded:
            assert untouched(whole[:GUARD])
            assert untouched(whole[GUARD + part.numel() :])
            assert part.dtype == torch.uint8 or not part.isnan().any()
        assert all(r.isfinite().all() for r in results.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ragged_last_slice_writes_nothing_beside_it(form, layout, device, guarded, small_launches, monkeypatch):
    """One launch, in slices of two blocks of channels, the last of one; its counters too lie between guards."""
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda x, size, dtype: x.new_empty(size, dtype=dtype).zero_())
    monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", launch_table.EVERY_NODE)
    launches, ticketed = [], launch_table.ticketed

    def two_blocks(*arguments):
        launches.append(ticketed(*arguments)._replace(slice_blocks=2))
        return launches[-1]

    monkeypatch.setattr(launch_table, "ticketed", two_blocks)
    run(fused, problem(form, (2, 37, 3, 2), torch.float32, device, layout=layout))
    assert [launch.channel_blocks % 2 for launch in launches] == [1, 1]
    for whole, part in guarded:
        assert untouched(whole[:GUARD])
        assert untouched(whole[GUARD + part.numel() :])


@covering(form=FORMS, layout=LAYOUTS, launches=LAUNCHES, indirect=("launches",))
def test_inputs_are_not_read_beyond_their_ends(form, layout, device, launches):
    """Every tensor lies between NaNs: one that is read into a result shows."""
    p = problem(form, (3, 19, 5, 3), torch.float32, device, layout=layout)

    def surrounded(x):
        whole = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
        part = whole.as_strided(x.shape, x.stride(), GUARD)
        return part.copy_(x)

    q = p.with_(**{n: surrounded(t) for n, t in p.tensors.items()})
    expected = run(fused, p)
    actual = run(fused, q)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert set(STATISTICS[:2]) <= expected.keys()
