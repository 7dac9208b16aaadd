"""The tickets alone, under many schedules."""

import pytest
from interleaved_cases import two_phases
from interleaving import interleaved
from scheduler import DISPATCHES, PICKS, Schedule

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize(("programs", "slice_blocks", "channel_blocks"), [(3, 2, 3), (1, 1, 3), (4, 3, 1)])
def test_tickets(pick, programs, slice_blocks, channel_blocks):
    for seed, resident in enumerate((1, 2, 5, None)):
        schedule = Schedule(pick, resident, DISPATCHES[seed % 3], seed)
        with interleaved(schedule) as log:
            seen = two_phases(programs, slice_blocks, channel_blocks)
        assert not log.findings, f"{schedule}\n{log}"
        assert (seen == programs * (programs + 1) // 2).all()
