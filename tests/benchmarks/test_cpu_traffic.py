"""``run.py cpu-traffic``: the arithmetic on what a stand-in for cachegrind counts, and the processes it would count."""

import json
import sys

import pytest
from count import cpu_traffic
from workloads.nodes import FORMS
from workloads.problems import LAYOUTS

# Of every process: what importing misses, and of each act as many lines as that many activations have.
STAND_IN = """#!{python}
import json, sys
from itertools import product
folder = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--cachegrind-out-file=")).removesuffix("/%p")
processes = product({forms}, {layouts}, {{"eager": (3, 7), "resfused": (2, 5)}}.items())
for i, (form, layout, (name, (forward, both))) in enumerate(processes):
    for j, (what, passes) in enumerate(dict(nothing=0, forward=forward, both=both).items()):
        pid = str(10 * i + j)
        with open(f"{{folder}}/{{pid}}", "w") as file:
            print("desc: LL cache\\nevents: Ir DLmr Dw DLmw\\nfn=f\\n1 2 3 4 5", file=file)
            print("summary: 9", 1000 + passes * {lines} // 4, 8, passes * {lines} * 3 // 4, file=file)
        print(json.dumps([pid, form, layout, name, what]))
"""


def test_passes_are_what_the_node_misses_beyond_the_imports(tmp_path, monkeypatch):
    lines = 8 * 64 * 64 * 64 * 4 // 64
    valgrind = tmp_path / "valgrind"
    valgrind.write_text(STAND_IN.format(python=sys.executable, forms=FORMS, layouts=tuple(LAYOUTS), lines=lines))
    valgrind.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = cpu_traffic.count()
    assert len(found) == len(FORMS) * len(LAYOUTS) * 4
    expected = {
        ("forward", "eager"): 3,
        ("backward", "eager"): 4,
        ("forward", "resfused"): 2,
        ("backward", "resfused"): 3,
    }
    for (_, _, *which), passes in found.items():
        assert passes == expected[tuple(which)]


def test_a_counter_that_fails_says_so(tmp_path, monkeypatch):
    valgrind = tmp_path / "valgrind"
    valgrind.write_text("#!/bin/sh\necho no such tool >&2\nexit 1\n")
    valgrind.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="cachegrind failed: no such tool"):
        cpu_traffic.count()


def test_every_node_has_a_process(monkeypatch, capfd, in_cpp):
    monkeypatch.setattr(cpu_traffic, "SHAPE", (2, 8, 4, 4))
    monkeypatch.setattr(cpu_traffic.resfused, "set_backend", lambda name: None)
    cpu_traffic.run_nodes()
    processes = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len({pid for pid, *_ in processes}) == len(processes) == len(FORMS) * len(LAYOUTS) * 2 * 3
