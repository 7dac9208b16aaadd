"""What the commands take: said in one line where it cannot be, before anything is imported, created or changed."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import commands
import pytest
import run
import train
from commands import COMMANDS
from console import arguments
from record import results
from record.results import NodeTime, Run

BENCHMARKS = Path(run.__file__).parent
INT, POSITIVE = "must be a whole number of at least 1, but got ", "must be a finite number above 0, but got "
HERE = {
    "time": "2030-01-01T00:00:00+00:00", "commit": "abc", "gpu": None, "driver": None, "cuda": None,
    "processor": "x86_64", "instruction_set": "AVX2", "threads": 2, "python": "3.12",
    "torch": "2.11.0", "triton": "3.6.0",
}  # fmt: skip
TIME = NodeTime([1.0], "norm+relu", 64, 7, 7, 8, "bfloat16", "channels_last", "both", 1e9, 4e3, "eager", False, 1e-3)


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line that a command says to what it refuses."""
    # Were one let through, it would end here.
    monkeypatch.setattr(run, "_prepare", None)

    def refused(*options, program=run.main):
        with pytest.raises(SystemExit) as error:
            program([str(option) for option in options])
        out, err = capsys.readouterr()
        assert (error.value.code, out) == (2, "")
        (line,) = err.splitlines()
        return line

    return refused


@pytest.fixture
def here(monkeypatch):
    """Runs say that they were made on it."""

    def use(**changes):
        monkeypatch.setattr(results, "environment", lambda *device: {**HERE, **changes})

    use()
    return use


def names(table):
    return tuple(table)


@pytest.mark.parametrize(
    ("written", "module", "meant"),
    [
        (commands.DTYPES, "workloads.problems", lambda m: names(m.DTYPES)),
        (commands.DEVICES, "measure.measuring", lambda m: names(m.BACKENDS)),
        (commands.MEMORIES, "measure.memory", lambda m: m.MEMORIES),
        (commands.LAYOUTS, "workloads.problems", lambda m: names(m.LAYOUTS)),
        (commands.VARIANTS, "measure.variants", lambda m: tuple(v for v in m.VARIANTS if v not in (m.OURS, m.AGAIN))),
        (commands.MODES, "measure.network_timing", lambda m: m.MODES),
        (commands.FUSED_WAYS, "measure.network_timing", lambda m: tuple(w for w in m.WAYS if m.WAYS[w].fused)),
        (commands.WAYS, "measure.network_timing", lambda m: tuple(w for w in m.WAYS if not m.WAYS[w].fused)),
        (commands.NETWORKS, "workloads.zoo", lambda m: names([*m.NETWORKS, *m.SMALL])),
        (commands.RECORD_STEPS, "record.command", lambda m: names(m.STEPS)),
        (commands.ARCHITECTURES, "count.audit", lambda m: names(m.ARCHITECTURES)),
        (commands.PARTS, "tuning.plan", lambda m: m.PARTS),
        (
            commands.KERNELS,
            "resfused.kernels.gpu.launch_file",
            lambda m: names([*m.STREAMING_KERNELS, *m.DIRECTIONS]),
        ),
        (commands.EXPERIMENTS, "science.command", lambda m: names(m.EXPERIMENTS)),
        (commands.DIGITS, "training.images", lambda m: m.DIGITS),
    ],
)
def test_names_are_those_of_the_modules(written, module, meant):
    assert written == meant(import_module(module))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_says_what_it_does(name):
    module = import_module(COMMANDS[name].module)
    assert COMMANDS[name].what == module.__doc__.partition("\n")[0]
    assert callable(getattr(module, "measure" if COMMANDS[name].measures else "run"))


@pytest.mark.parametrize("options", [["--help"], ["nodes", "--help"], ["frobnicate"], ["host", "--json", "."]])
def test_help_and_errors_wait_for_nothing(options):
    command = [sys.executable, "-X", "importtime", str(BENCHMARKS / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "resfused", "rich", "matplotlib", "numpy"}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    if "--help" in options:
        assert (done.returncode, said) == (0, [])
        assert "usage: run.py" in done.stdout
    else:
        assert (done.returncode, len(said), done.stdout) == (2, 1, "")
        assert said[0].startswith("run.py: error: argument ")


def test_nothing_is_taken_as_it_comes():
    """Every number and every path that any command takes goes through a check, but for what is only read."""
    (subparsers,) = (a for a in commands.parser("")._actions if isinstance(a, argparse._SubParsersAction))
    parsers = {"": commands.parser(""), "train.py": train._parser(), **subparsers.choices}
    unchecked = {
        (name, action.dest)
        for name, parser in parsers.items()
        for action in parser._actions
        if action.nargs != 0 and action.choices is None and getattr(action.type, "__module__", "") != arguments.__name__
    }
    assert unchecked == {("train.py", "data"), ("train.py", "model"), ("science", "data"), ("report", "files")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nodes", "--batch", "-1"], f"--batch: {INT}'-1'"),
        (["networks", "--batch", "0"], f"--batch: {INT}'0'"),
        (["profile", "--repetitions", "-3"], f"--repetitions: {INT}'-3'"),
        (["host", "--repetitions", "0"], f"--repetitions: {INT}'0'"),
        (["tune", "--repetitions", "1.5"], f"--repetitions: {INT}'1.5'"),
        (["networks", "--image-size", "-5"], f"--image-size: {INT}'-5'"),
        (["networks", "--batch", "9999999999"], "--batch: must be at most 2147483647, but got 9999999999"),
        (["--threads", "0"], f"--threads: {INT}'0'"),
        (["nodes", "--device", "tpu"], "--device: invalid choice: 'tpu' (choose from "),
        (["--minutes", "nan"], f"--minutes: {POSITIVE}'nan'"),
        (["nodes", "--minutes", "-5"], f"--minutes: {POSITIVE}'-5'"),
        (["tune", "--minutes", "inf"], f"--minutes: {POSITIVE}'inf'"),
        (["traffic", "--bandwidth", "0"], f"--bandwidth: {POSITIVE}'0'"),
        (["science", "--seeds", "many"], f"--seeds: {INT}'many'"),
        (["science", "--processes", "0"], f"--processes: {INT}'0'"),
        (["science", "slides"], "EXPERIMENT: must be one of degradation, "),
        (["audit", "--arch", "sm_7"], "--arch: invalid choice: 'sm_7' (choose from "),
        (["frobnicate"], "COMMAND: invalid choice: 'frobnicate' (choose from "),
    ],
)
def test_arguments_that_cannot_be(options, said, refused):
    assert refused(*options).startswith(f"run.py: error: argument {said}")


@pytest.fixture
def places(tmp_path):
    """Paths that cannot be, by what is wrong with them."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("of another kind\n")
    return {
        "folder": tmp_path / "folder", "file": tmp_path / "file", "below a file": tmp_path / "file" / "below" / "x",
        "unwritable": Path("/proc/x/y"), "too long": tmp_path / ("x" * 300),
    }  # fmt: skip


def content(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


JSON = [
    ["traffic", "--json"], ["cpu-traffic", "--json"], ["audit", "--json"], ["host", "--json"], ["coverage", "--json"],
    ["tune", "--output"], ["tune", "--record"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "place", "said"),
    [
        *((options, "folder", "must be a file, but {} is a folder") for options in JSON),
        *((options, "file", "must be a JSON file or a new one, but {} is of another format") for options in JSON),
        (["nodes", "--results"], "folder", "must be a file, but {} is a folder"),
        (["--results"], "folder", "must be a file, but {} is a folder"),
        (["report", "--readme"], "folder", "must be a file, but {} is a folder"),
        (["report", "--output"], "file", "must be a folder, but {} is a file"),
        (["science", "--output"], "file", "must be a folder, but {} is a file"),
        (["host", "--json"], "below a file", "must be in a folder, but "),
        (["science", "--output"], "below a file", "must be in a folder, but "),
        (["host", "--json"], "unwritable", "/proc/x cannot be written: "),
        (["science", "--output"], "unwritable", "{} cannot be written: "),
        (["host", "--json"], "too long", "{} cannot be written: File name too long"),
    ],
)
def test_paths_that_cannot_be_written(options, place, said, refused, places, tmp_path):
    before = content(tmp_path)
    expected = f"run.py: error: argument {options[-1]}: {said.format(places[place])}"
    assert refused(*options, places[place]).startswith(expected)
    assert content(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to be somebody else")
def test_what_belongs_to_another_user(tmp_path):
    own = tmp_path / "own.json"
    own.write_text("{}")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/tmp") and path != Path("/"):
            path.chmod(0o755)
    os.seteuid(65534)
    try:
        for check, path in (
            (arguments.json_file, own), (arguments.output_file, tmp_path / "new"), (arguments.output_folder, tmp_path),
        ):  # fmt: skip
            with pytest.raises(arguments.UsageError, match="cannot be written: Permission denied"):
                check(path)
    finally:
        os.seteuid(0)


def test_paths_that_can_be_written_are_not_made_yet(tmp_path):
    new, there = tmp_path / "a" / "b" / "new.json", tmp_path / "there.json"
    there.write_text("[1]")
    for path in (new, there, Path(os.devnull)):
        assert arguments.json_file(str(path)) == path
    assert arguments.output_folder(str(tmp_path / "c")) == tmp_path / "c"
    assert content(tmp_path) == {there: b"[1]"}
    arguments.write_json(new, {"x": 1})
    assert json.loads(new.read_text()) == {"x": 1}


def without(*keys):
    made = {"format": 1, "runs": [{"environment": dict(HERE), "settings": {}, "nodes": [dict(vars(TIME))]}]}
    place = made
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return json.dumps(made)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no result file of this version"),
        (without("format"), "is no result file of this version"),
        (without("runs"), "is no whole result file: it lacks 'runs'"),
        (without("runs", 0, "environment"), "is no whole result file: it lacks 'environment'"),
        (without("runs", 0, "environment", "torch"), "is no whole result file: it lacks 'environment.torch'"),
        (without("runs", 0, "nodes", 0, "batch"), "'batch'"),
        ('{"format": 1, "runs": 5}', "is no whole result file: 'int' object is not iterable"),
    ],
)
@pytest.mark.parametrize("command", [[], ["networks"], ["report"]], ids=["default", "networks", "report"])
def test_damaged_result_files(command, text, said, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_prepare", lambda interpreted: None)
    path = tmp_path / "bad.json"
    path.write_text(text)
    line = refused(*command, *([path] if command == ["report"] else ["--results", path]))
    assert line.startswith(f"run.py: error: {path} ")
    assert said in line
    assert content(tmp_path) == {path: text.encode()}


def test_a_readme_that_cannot_be_is_said_before_anything_is_written(refused, tmp_path, here, monkeypatch):
    monkeypatch.setattr(run, "_prepare", lambda interpreted: None)
    path, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    Run(path, {}).add([TIME])
    assert f"--readme {readme} cannot be read" in refused("report", path, "--readme", readme)
    readme.write_text("# mine\n")
    assert "for the tables to stand between" in refused("report", path, "--readme", readme)
    assert sorted(tmp_path.iterdir()) == [readme, path]


def test_result_files_in_one_folder_keep_their_own_plots(here, tmp_path):
    """And those of two machines, wherever they lie and whatever they are called."""

    def made(name, other, **changes):
        here(**changes)
        Run(tmp_path / name, {}).add([replace(TIME, variant=variant) for variant in ("resfused", other)])
        return str(tmp_path / name)

    def others(stem):
        with (tmp_path / f"{stem}-nodes.csv").open() as file:
            return [row["variant"] for row in csv.DictReader(file) if row["variant"] != "resfused"]

    one, two = made("one.json", "eager"), made("two.json", "attorch")
    other = made("x/one.json", "torch.compile", gpu="NVIDIA A100")
    for path in (one, two):
        assert run.main(["report", path]) == 0
    assert (others("one"), others("two")) == (["eager"], ["attorch"])
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}-speedup-bfloat16-channels_last-batch-8.png" for name in ("one", "two")
    }
    assert run.main(["report", one, two, other]) == 0
    assert others("one+two") == ["eager", "attorch"]
    assert others("x/one") == ["torch.compile"]
    assert others("one") == ["eager"]
    assert run.main(["report", one, other, "--output", str(tmp_path / "all")]) == 0
    assert others("all/one-x86-64-with-avx2-2-threads") == ["eager"]
    assert others("all/one-nvidia-a100") == ["torch.compile"]


@pytest.mark.parametrize(("epochs", "expected"), [("1", 0.5), ("2", 1.0), ("60", 1.0)])
def test_a_warm_up_is_no_longer_than_half_of_the_training(epochs, expected):
    assert train._arguments(["--epochs", epochs]).warmup_epochs == expected
