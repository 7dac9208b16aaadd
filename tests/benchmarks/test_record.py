"""``run.py record``: steps that end well, fail, hang or are cut off, on stand-ins for what needs a GPU."""

import json
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import torch
from console.arguments import UsageError
from record import command as record

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class StandIn(record.Step):
    def command(self, out):
        return [sys.executable, "-c", self.what, str(out)]


# Adds a line each time it runs; says where it runs and whether the library would be found.
COUNTS = "import os, sys; open(sys.argv[1] + '/ran', 'a').write('x'); print(os.getcwd(), os.environ['PYTHONPATH'])"
# The process that it starts would live on, and say so.
HANGS = (
    "import subprocess, sys, time; print('begun', flush=True);"
    "subprocess.Popen([sys.executable, '-c', 'import sys, time; time.sleep(2); open(sys.argv[1], \"w\")',"
    " sys.argv[1] + '/outlived']); time.sleep(60)"
)
STEPS = {
    "good": StandIn(COUNTS),
    "bad": StandIn("import sys; print('all but this'); sys.exit('what went wrong')"),
    "slow": StandIn(HANGS, minutes=0.01),
    "tuned": StandIn("print('tuned')", tuned=True),
}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command on the stand-ins, as on a GPU; its exit code."""
    monkeypatch.setattr(record, "STEPS", STEPS)
    monkeypatch.setattr(record, "_check", lambda out: out.mkdir(exist_ok=True))
    monkeypatch.setattr(record, "LAUNCH_TABLE", tmp_path / "in_place.json")

    def run(*steps, **options):
        given = {"out": tmp_path / "out", "step": list(steps) or None, "list": False, "minutes": None, **options}
        return record.run(Namespace(**given))

    return run


def summary(folder):
    return {
        name: step["state"] for name, step in json.loads((folder / "out" / "record.json").read_text())["steps"].items()
    }


def test_every_step_is_run_and_each_leaves_what_it_has(call, tmp_path, capsys):
    assert call() == 1
    out = tmp_path / "out"
    assert summary(tmp_path) == {"good": "done", "bad": "failed", "slow": "out of time", "tuned": "failed"}
    log = (out / "record.log").read_text()
    assert f"{ROOT} {ROOT}" in log
    assert "begun" in log
    steps = json.loads((out / "record.json").read_text())["steps"]
    assert steps["bad"]["code"] == 1
    assert steps["bad"]["tail"] == ["all but this", "what went wrong"]
    assert "launch_table.json is not there" in steps["tuned"]["why"]
    said = capsys.readouterr().out
    assert "what went wrong" in said
    assert "not done: bad, slow, tuned" in said
    time.sleep(2.5)
    assert not (out / "outlived").exists()


def test_what_is_done_is_not_run_again(call, tmp_path):
    assert call("good") == call() - 1 == 0
    assert (tmp_path / "out" / "ran").read_text() == "x"
    assert call("good") == 0, "unless it is asked for"
    assert (tmp_path / "out" / "ran").read_text() == "xx"


def test_a_table_that_was_found_is_put_in_place(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "launch_table.json").write_text("{}")
    assert call("tuned") == 0
    assert (tmp_path / "in_place.json").read_text() == "{}"


def test_nothing_begins_that_might_not_end(call, tmp_path, capsys):
    assert call("slow", "good", minutes=1.0) == 1
    assert "good: its 9 minutes are more than are left" in capsys.readouterr().out
    assert not (tmp_path / "out" / "ran").exists()


def test_a_call_that_is_cut_off_is_seen(call, tmp_path, monkeypatch, capsys):
    def cut_off(*about):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(record, "_ended", cut_off)
        with pytest.raises(KeyboardInterrupt):
            call("good")
    assert summary(tmp_path) == {"good": "interrupted"}
    assert call(list=True) == 0
    assert "interrupted" in capsys.readouterr().out
    assert call("good") == 0
    assert summary(tmp_path) == {"good": "done"}


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 1}'])
def test_another_file_is_no_record(call, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text(content)
    with pytest.raises(UsageError, match=r"record\.json is no record of steps"):
        call("good")
    assert (tmp_path / "out" / "record.json").read_text() == content


def test_a_gpu_is_asked_for_first(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs a CUDA GPU"):
            record._check(tmp_path)


@pytest.mark.parametrize("name", record.STEPS)
def test_a_step_is_a_command_that_there_is(name, tmp_path):
    step = record.STEPS[name]
    assert step.minutes <= record.MOST_MINUTES
    command = step.command(tmp_path)
    if step.tests:
        assert all((ROOT / path).exists() for path in step.arguments)
    else:
        args = commands.parser("").parse_args(command[2:])
        assert args.minutes <= step.minutes - 1
        written = args.output if args.command == "tune" else args.results
        assert written.parent == tmp_path
