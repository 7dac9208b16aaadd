"""Every broken protocol is found, by the detector or as a deadlock, whatever the numbers that come out."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import FunctionType

import interleaved_cases
import pytest
from broken_protocols import BROKEN, MERGES, ONE_LAUNCH, TICKETS
from faults import CHANGE, Fault
from interleaved_cases import BY_COLUMNS, SCHEDULES, SHAPES_IN_GROUPS, kept_zeros, node, two_phases
from interleaving import interleaved
from oracle import run
from resfused.kernels.gpu import launch_table
from scheduler import DeadlockError
from triton.runtime.interpreter import InterpretedFunction

import resfused.functional as fused

pytestmark = pytest.mark.interpreter
PACKAGE = "resfused.kernels.gpu"
CASES = [
    pytest.param(kind, what, Fault(name, file, CHANGE.sub(r"\1", code), CHANGE.sub(r"\2", code), ""), id=name)
    for (file, what), kinds in BROKEN.items()
    for kind, codes in kinds.items()
    for name, code in codes.items()
]


@pytest.fixture
def put_in(monkeypatch, tmp_path):
    """Puts a fault into a copy of its module, whose functions then stand wherever the module's own did."""

    def put(fault):
        source = fault.source()
        changed = tmp_path / fault.file
        changed.write_text(source.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        own = import_module(f"{PACKAGE}.{source.stem}")
        spec = spec_from_file_location(f"{PACKAGE}.broken_{source.stem}", changed)
        broken = module_from_spec(spec)
        spec.loader.exec_module(broken)
        users = [module for name, module in sys.modules.items() if name.startswith("resfused")]
        for module in (*users, interleaved_cases):
            for name, value in list(vars(module).items()):
                is_function = isinstance(value, InterpretedFunction | FunctionType)
                if is_function and getattr(value, "fn", value).__module__ == own.__name__:
                    monkeypatch.setattr(module, name, vars(broken)[name])

    return put


def _launches(what):
    """A call that launches ``what`` the protocol is about."""
    if what == TICKETS:
        return lambda: two_phases(3, 2, 3)
    if what == ONE_LAUNCH:
        p = node("norm+relu", "channels_last")
    else:
        p = node("norm+relu", "channels_last" if what == MERGES else BY_COLUMNS, SHAPES_IN_GROUPS)
    return lambda: run(fused, p)


@pytest.mark.parametrize(("kind", "what", "fault"), CASES)
def test_found(kind, what, fault, put_in, small_launches):
    put_in(fault)
    launch = _launches(what)
    nodes = launch_table.EVERY_NODE if what == ONE_LAUNCH else launch_table.NO_NODE
    found = set()
    with launch_table.using(ONE_LAUNCH_ELEMENTS=nodes), kept_zeros():
        # Every schedule finds the counters as the one before has left them.
        for schedule in reversed(SCHEDULES):
            with interleaved(schedule) as log:
                try:
                    launch()
                except DeadlockError:
                    found.add("deadlock")
                except IndexError:
                    found.add("outside")
            found |= log.kinds
            if kind in found:
                return
    pytest.fail(f"{kind} not among {found or 'nothing'}")
