"""Launch plans: what is compiled is called again only where it fits, on Triton's launcher above a driver of stubs."""

from pathlib import Path

import pytest
from stubbed import results_of

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results_of(Path(__file__).parent / "plan_cases.py", tmp_path_factory)


@pytest.mark.parametrize("change", ["first", "shape", "layout", "dtype", "alignment"])
def test_what_is_new_is_looked_up_once(found, change):
    (looked_up, launched), again = found[change]
    assert looked_up == launched > 0
    assert again == [0, launched]


CHANGES = (
    "vectors' dtype", "launch table", "hook", "forward, activation", "backward, activation", "backward, x",
    "backward, x's dtype",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_up_again(found, change):
    looked_up, launched = found[change]
    assert looked_up == launched > 0


def test_another_momentum_is_no_other_kernel(found):
    looked_up, launched = found["momentum"]
    assert looked_up == 0 < launched


def test_kernels_are_given_what_triton_gives_them(found):
    first, *others = found["arguments"]
    assert {"x", "weight", "mean", "var", "made"} <= {value for launch in first for value in launch}
    assert others == [first, first]


def test_the_dispatcher_has_a_say_where_it_is_watched(found):
    """A forward and a backward are seen by a mode, and both steps run the kernels."""
    assert found["traced"] == [2, 2]


def test_plans_hold_no_tensors(found):
    alive, made = found["freed"]
    assert alive == 0 < made


def test_plans_are_bounded(found):
    assert 0 < found["bounded"] <= 2**13


def test_threads(found):
    """Each of eight threads makes its 20 steps' launches."""
    assert found["threads"] == 8 * 20 * found["first"][0][1]
