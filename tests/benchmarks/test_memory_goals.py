"""What training steps are held to in memory, and what was reached of it."""

from measure.network_timing import EAGER, OURS
from record.results import Results, StepMemory
from report import command, memory_goals
from report.goals import row

MADE = {"gpu": None, "torch": "2.14", "triton": "3.8", "commit": "abc"}


def test_goals_of_what_a_step_keeps(tmp_path):
    """Beside eager's, or another way's time, of the batch and the size that they are set for."""

    def step(way, live, ms, **other):
        of = {"network": "torchvision/resnet50", "batch": 16, "image_size": 160, **other}
        return StepMemory([ms], *of.values(), "float32", way, live * 10**6, 2 * live * 10**6, 1e-6)

    found = [
        step("eager", 100, 10.0), step("resfused", 101, 8.0), step("resfused, recomputation", 60, 8.2),
        step("eager", 100, 1.0, batch=8), step("resfused", 1, 1.0, batch=8),
    ]  # fmt: skip
    results = Results("a CPU", [MADE], found, tmp_path / "cpu")
    rows = [row(goal, results) for goal in memory_goals.GOALS]
    assert [reached[1:] for reached in rows[:3]] == [
        ("<= 1x", "1.01x (101.0 of 100.0 MB, 160x160)", "no"), ("<= 0.8x", "0.6x (60.0 of 100.0 MB, 160x160)", "yes"),
        ("<= 1.05x", "1.02x (8.2 of 8.0 ms, 160x160)", "yes"),
    ]  # fmt: skip
    assert {reached[2] for reached in rows[3:]} == {"not measured yet"}
    assert len(rows) == 4 * 3 + 2


def test_a_goal_is_reached_where_it_was_measured(tmp_path):
    """On another machine than the first, which is named."""
    of = "torchvision/resnet50", 16, 160, "float32"
    steps = [StepMemory([1.0], *of, way, 5 * 10**6, 6 * 10**6, 1e-6) for way in (EAGER, OURS)]
    machines = {
        name: Results(name, [MADE], measured, tmp_path / name) for name, measured in (("first", []), ("other", steps))
    }
    lines = command._goals(machines, "a third", memory_goals.GOALS).splitlines()
    assert lines[0] == "| on a third | goal | reached on first | met |"
    assert lines[2].endswith("| <= 1x | 1x (5.0 of 5.0 MB, 160x160), on other | yes |")
    assert lines[3].endswith("| <= 0.8x | not measured yet |  |")
