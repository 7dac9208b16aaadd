"""``run.py cpu-traffic``: its processes and its arithmetic under a stand-in for cachegrind, and what its acts run."""

import json
import sys

import pytest
from count import cpu_traffic
from workloads.nodes import FORMS
from workloads.problems import LAYOUTS

# Runs the processes and, as cachegrind does, leaves what each has missed and what its parent had when it was forked:
# importing and tensors miss something, and each act as many lines as that many activations have.
STAND_IN = """#!{python}
import os, sys
from types import SimpleNamespace
from count import cpu_traffic

folder = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--cachegrind-out-file=")).removesuffix("/%p")
missed = 1000

def miss(passes):
    global missed
    missed += int(passes * {lines})

class Node:
    dy = SimpleNamespace(clone=lambda: miss({copy}))
    def forward(self, library):
        miss(library[0])
        return library
    def backward(self, y):
        miss(y[1])

def problem(*_):
    miss(5)
    return Node()

def leave(code, exit=os._exit):
    with open(f"{{folder}}/{{os.getpid()}}", "w") as file:
        print("desc: LL cache\\nevents: Ir DLmr Dw DLmw\\nfn=f\\n1 2 3 4 5", file=file)
        print("summary: 9", missed // 4, 8, missed - missed // 4, file=file)
    exit(code)

cpu_traffic.LIBRARIES = {{"eager": (3, 4), "resfused": (2, 2.5)}}
cpu_traffic.resfused.set_backend = lambda name: None
cpu_traffic.torch.zeros = lambda *_, **__: miss(7)
cpu_traffic.problem = problem
os._exit = leave
exec(sys.argv[-1])
"""


@pytest.fixture
def valgrind(tmp_path, monkeypatch):
    """Makes one of a script."""

    def make(script):
        path = tmp_path / "valgrind"
        path.write_text(script)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def stand_in(copy):
    return STAND_IN.format(python=sys.executable, copy=copy, lines=8 * 64 * 56 * 56 * 4 // 64)


def test_passes_are_the_nodes_alone(valgrind):
    """Not what importing, making tensors and emptying the caches miss."""
    valgrind(stand_in(copy=2))
    found = cpu_traffic.count()
    assert len(found) == len(FORMS) * len(LAYOUTS) * 4
    expected = {
        ("forward", "eager"): 3,
        ("backward", "eager"): 4,
        ("forward", "resfused"): 2,
        ("backward", "resfused"): 2.5,
    }
    for (_, _, *which), passes in found.items():
        assert passes == expected[tuple(which)]


def test_a_copy_is_two_passes_or_nothing_is_told(valgrind):
    valgrind(stand_in(copy=2.1))
    with pytest.raises(RuntimeError, match=r"a copy counts as 2\.10 passes beside norm\+relu, channels_last, eager"):
        cpu_traffic.count()


def test_a_counter_that_fails_says_so(valgrind):
    valgrind("#!/bin/sh\necho no such tool >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="cachegrind failed: no such tool"):
        cpu_traffic.count()


def test_every_node_has_a_process(monkeypatch, capfd, in_cpp):
    monkeypatch.setattr(cpu_traffic, "SHAPE", (2, 8, 4, 4))
    monkeypatch.setattr(cpu_traffic.resfused, "set_backend", lambda name: None)
    cpu_traffic.run_nodes()
    processes = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len({pid for pid, *_ in processes}) == len(processes) == len(FORMS) * len(LAYOUTS) * 2 * 4
