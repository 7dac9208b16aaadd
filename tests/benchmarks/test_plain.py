"""What is said where rich and matplotlib are not installed."""

import sys

import pytest
from console import plain, rows
from rich.markup import escape


@pytest.fixture
def without_rich(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(plain, "find_spec", lambda name: None)
    plain.stand_in()
    assert "rich is not installed" in capsys.readouterr().err


def test_tables_and_lines_are_plain(without_rich, capsys):
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Right")
    table.add_column("form", justify="left")
    table.add_row("[green]16 of 16")
    shown = rows.Rows("Nodes", ("form",), ("ms",), "Medians.")
    shown.add("norm+relu", "1.5", style="red")
    for each in (table, shown, "[bold red]WRONG[/]: it", escape("a [reason]")):
        Console().print(each, highlight=False)
    assert capsys.readouterr().out.splitlines() == [
        "Right", "form", "16 of 16", "Nodes", "form\tms", "norm+relu\t1.5", "Medians.", "WRONG: it", "a [reason]",
    ]  # fmt: skip
    Console(quiet=True).print("nothing")
    with Console().status("Compiling"):
        Console().print("[red]as it is", markup=False)
    assert capsys.readouterr().out == "Compiling\n[red]as it is\n"


def test_progress_is_said_in_lines(without_rich, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "console.progress", raising=False)
    from console.progress import track
    from rich.console import Console

    monkeypatch.setattr(sys.modules["console.progress"], "SECONDS", 0)
    capsys.readouterr()
    assert list(track("ab", "Compiling", Console())) == ["a", "b"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("Compiling: 2/2")


def test_where_rich_is_it_stays(capsys):
    before = sys.modules["rich.markup"]
    plain.stand_in()
    assert sys.modules["rich.markup"] is before
    assert capsys.readouterr().out == ""
