"""The list of deliberate faults fits the sources and the tests; ``python tests/faults.py`` puts them in."""

import re
from pathlib import Path

import faults
import pytest


def test_every_fault_has_its_place_and_its_tests():
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    for fault in faults.FAULTS:
        fault.source()
        assert fault.new != fault.old
        file, _, function = faults.arguments(fault.tests)[0].partition("::")
        name = function.partition("[")[0]
        assert not name or re.search(rf"^def {name}\(", Path(file).read_text(), re.MULTILINE), fault


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tile.py", "no such code", "tile.py has 0 times 'no such code'"),
        ("tile.py", "import", "tile.py has [2-9] times"),
        ("no.py", "import", "0 files no.py in kernels, resfused"),
    ],
)
def test_a_list_that_is_out_of_date_is_an_error(file, text, message):
    with pytest.raises(LookupError, match=f"out of date: .*{message}"):
        faults.Fault("", file, text, "", "").source()
