"""The launch table's file: it says what is in force, is read back as it was written, is refused where it is wrong."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from count.recorder import record
from oracle import FORMS, LAYOUTS, problem, run
from resfused.kernels.geometry import Geometry
from resfused.kernels.gpu import launch_file, launch_table
from resfused.kernels.gpu.launch_file import Entry
from resfused.kernels.gpu.launching import tile_options

import resfused.functional as fused

ROOT = Path(__file__).parents[2]
CHANGES = {
    "streaming.apply.contiguous[0].warps": (3, "a power of two from 1 to 32"),
    "streaming.reduce.channels_last[0].elements": (1000, "a power of two from 8"),
    "streaming.reduce.channels_last[0].inner": (4096, "a power of two from 8 to "),
    "streaming.statistics.contiguous[0].limit": (5, "null"),
    "streaming.apply.channels_last[0].stages": (0, "a positive integer"),
    "streaming.normalise.channels_last": ([], "a list of entries"),
    "ticketed.forward.contiguous.programs": (0, "a positive integer"),
    "ticketed.backward.channels_last.programs": (1.5, "a positive integer"),
    "one_launch_elements.forward.contiguous": (-1, "null or an integer from 0"),
    "second_phase_reversed": (1, "true or false"),
    "channel_major": (None, "true or false"),
    "tuned_on": ("H200", "null or a list of objects"),
}


def changed(key: str, change) -> dict:
    """The content of the kernels' own file after ``change(parent, last part of the key)``."""
    content = json.loads(launch_file.PATH.read_text())
    parts = key.replace("[", ".").replace("]", "").split(".")
    *parents, last = (int(part) if part.isdigit() else part for part in parts)
    parent = content
    for part in parents:
        parent = parent[part]
    change(parent, last)
    return content


def refusal(content: object, path: Path) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=path.name) as caught:
        launch_file.read(path)
    return str(caught.value)


def test_the_file_says_what_is_in_force() -> None:
    table = launch_file.read()
    assert launch_file.PATH == ROOT / "kernels" / "gpu" / "launch_table.json"
    for name, value in table.constants.items():
        # The environment may say otherwise of this one.
        assert name == "ONE_LAUNCH_ELEMENTS" or getattr(launch_table, name) == value
    content = json.loads(launch_file.PATH.read_text())
    for kernel, layouts in content["streaming"].items():
        for layout, classes in layouts.items():
            for e in classes:
                g = Geometry(layout == "channels_last", 1, (e["limit"] or 2**28) // 256, 256)
                launch = launch_table.streaming(kernel, g)
                assert launch.block_positions * launch.block_channels == e["elements"]
                assert launch.warps == e["warps"]


def test_a_fork_halves_the_tile_of_apply_alone() -> None:
    """And no other's, whose registers have room for the second gradient; half as many programs again fit beside."""
    for (kernel, channels_last), norms in product(launch_table.STREAMING, (1, 2)):
        g = Geometry(channels_last, 1, 2**20, 256)
        launches = [launch_table.streaming(kernel, g, norms=norms, forked=forked) for forked in (False, True)]
        whole, of_fork = (launch.block_positions * launch.block_channels for launch in launches)
        halved = (kernel, channels_last, norms) == ("apply", True, 2)
        assert whole == of_fork * (2 if halved else 1)
        assert launches[1].grid[0] == launches[0].grid[0] * (1.5 if halved else 1)


def test_in_float64_no_more_programs_fit_beside_a_fork() -> None:
    g = Geometry(True, 1, 2**20, 256)
    whole, of_fork = (launch_table.streaming("apply", g, True, 2, forked=forked) for forked in (False, True))
    assert whole.block_positions == 2 * of_fork.block_positions
    assert whole.grid == of_fork.grid


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    table = launch_file.read()._replace(
        ticketed={key: Entry(2**i, 8, 7, 8, 2) for i, key in enumerate(launch_table.TICKETED, start=4)},
        one_launch_elements=dict(zip(launch_table.TICKETED, (None, 0, 5, 2**40), strict=True)),
        second_phase_reversed=False,
        tuned_on=[{"gpu": "NVIDIA H200"}],
    )
    path = tmp_path / "table.json"
    path.write_text("another")
    launch_file.write(table, path)
    assert launch_file.read(path) == table
    assert list(tmp_path.iterdir()) == [path]
    launch_file.write(launch_file.read(), path)
    assert path.read_text() == launch_file.PATH.read_text()


@pytest.mark.parametrize("key", CHANGES)
def test_a_wrong_value_is_an_error_that_names_file_and_key(key: str, tmp_path: Path) -> None:
    value, needs = CHANGES[key]
    content = changed(key, lambda parent, last: parent.__setitem__(last, value))
    assert f": {key} must be {needs}" in refusal(content, tmp_path / "table.json")


def test_limits_must_rise(tmp_path: Path) -> None:
    def split(limits: list[int | None]):
        return lambda parent, last: parent.__setitem__(last, [parent[last][0] | {"limit": limit} for limit in limits])

    path = tmp_path / "table.json"
    path.write_text(json.dumps(changed("streaming.reduce.contiguous", split([5, 9, None]))))
    assert [limit for limit, _ in launch_file.read(path).streaming["reduce", False]] == [5, 9, None]
    for limits, at, needs in (([5, 5, None], 1, 5), ([None, None], 0, 0)):
        content = changed("streaming.reduce.contiguous", split(limits))
        assert f"contiguous[{at}].limit must be an integer above {needs}" in refusal(content, path)


@pytest.mark.parametrize("key", ["ticketed", "streaming.apply.contiguous", "streaming.reduce.contiguous[0].warps"])
def test_missing_and_unknown_keys(key: str, tmp_path: Path) -> None:
    parent, _, last = key.rpartition(".")
    missing = refusal(changed(key, lambda d, last: d.pop(last)), tmp_path / "table.json")
    assert f"{parent or 'the table'} must have the keys" in missing
    assert f"missing: {last}; unknown: none" in missing
    unknown = refusal(changed(key, lambda d, last: d.update(wraps=4)), tmp_path / "table.json")
    assert "missing: none; unknown: wraps" in unknown


@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00"])
def test_what_is_no_table(content: str, tmp_path: Path) -> None:
    assert "is not JSON" in refusal(content, tmp_path / "table.json") or content == "[1]"


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_nodes_up_to_the_limit_take_one_launch(form: str, layout: str, device: torch.device) -> None:
    """Each direction by its own limit; the other layout's is not asked."""
    p = problem(form, (2, 8, 3, 3), torch.float32, device, layout=layout)
    g = layout == "channels_last"
    for forward, backward, counts in ((144, 143, 3), (143, 144, 3), (None, None, 2), (0, 0, 4), (143, 143, 4)):
        limits = {("forward", g): forward, ("backward", g): backward, ("forward", not g): 0, ("backward", not g): None}
        with launch_table.using(ONE_LAUNCH_ELEMENTS=limits), record(execute=False) as launches:
            run(fused, p)
        assert len(launches) == counts
        assert ("_forward_kernel" in {launch.kernel for launch in launches}) == (forward in (144, None))
        assert ("_backward_kernel" in {launch.kernel for launch in launches}) == (backward in (144, None))


def test_another_table_is_in_force_only_within() -> None:
    g = Geometry(True, 1, 1000, 64)
    before = launch_table.streaming("apply", g)
    reversed_before = launch_table.SECOND_PHASE_REVERSED
    assert tile_options("apply", g, torch.float32, torch.device("meta"), 1)[1]["REVERSED"] == reversed_before
    entry = Entry(64, 16, 3, 2, 1)
    streaming = {**launch_table.STREAMING, ("apply", True): ((None, entry),)}
    with launch_table.using(STREAMING=streaming, SECOND_PHASE_REVERSED=not reversed_before):
        assert launch_table.streaming("apply", g).warps == 2
        assert tile_options("apply", g, torch.float32, torch.device("meta"), 1)[1]["REVERSED"] != reversed_before
    assert tile_options("apply", g, torch.float32, torch.device("meta"), 1)[1]["REVERSED"] == reversed_before
    assert launch_table.streaming("apply", g) == before


def table_module(monkeypatch: pytest.MonkeyPatch, value: str | None) -> ModuleType:
    """Another copy of the module, made while the variable has this value."""
    if value is None:
        monkeypatch.delenv("RESFUSED_ONE_LAUNCH", raising=False)
    else:
        monkeypatch.setenv("RESFUSED_ONE_LAUNCH", value)
    spec = spec_from_file_location("resfused.kernels.gpu.another", launch_table.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forces every node or none; without it the file decides."""
    limits = dict.fromkeys(launch_table.TICKETED, 144)
    table = launch_file.read()._replace(one_launch_elements=limits)
    monkeypatch.setattr(launch_file, "read", lambda: table)
    for value, expected in ((None, 144), ("1", None), ("0", 0)):
        found = table_module(monkeypatch, value)
        assert set(found.ONE_LAUNCH_ELEMENTS.values()) == {expected}
    with pytest.raises(ValueError, match="RESFUSED_ONE_LAUNCH must be 0 or 1, or not be set, but is 'yes'"):
        table_module(monkeypatch, "yes")
