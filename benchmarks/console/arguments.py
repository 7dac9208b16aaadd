"""What commands are given: numbers are checked, and paths tried, before any work begins. Needs no torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

MOST = 2**31 - 1


class UsageError(argparse.ArgumentTypeError):
    """What was asked for cannot be done, and why, in a line. While options are read, argparse adds which one it was."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2; options are written out."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog.partition(' ')[0]}: error: {line}\n")


def positive_int(text: str) -> int:
    return _whole_number(text, least=1)


def count(text: str) -> int:
    """From 0 on."""
    return _whole_number(text, least=0)


def positive_float(text: str) -> float:
    return _number(text, "a finite number above 0", lambda number: 0 < number < math.inf)


def non_negative_float(text: str) -> float:
    return _number(text, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def fraction(text: str) -> float:
    return _number(text, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """As ``choices``, which argparse cannot combine with any number of arguments."""

    def named(text: str) -> str:
        if text not in names:
            raise UsageError(f"must be one of {', '.join(names)}, but got {text!r}")
        return text

    return named


def output_file(text: str | Path) -> Path:
    """A file that can be written, or made in a folder that may be made with it; nothing is created or changed yet."""
    path = Path(text)
    with _trying(path):
        if path.is_dir():
            raise UsageError(f"must be a file, but {path} is a folder")
        if not path.exists():
            output_folder(path.parent)
        elif path.is_file():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):
            # Not opened: a pipe's reader would take the closing for the end.
            raise UsageError(f"{path} cannot be written")
    return path


def json_file(text: str | Path) -> Path:
    """As ``output_file``; one that is there must be JSON, so that no file of another kind is written over."""
    path = output_file(text)
    with _trying(path):
        try:
            if path.is_file() and path.stat().st_size:
                json.loads(path.read_bytes())
        except ValueError as error:
            raise UsageError(f"must be a JSON file or a new one, but {path} is of another format") from error
    return path


def output_folder(text: str | Path) -> Path:
    """A folder that files can be made in, or that can be made with its parents; nothing is created yet."""
    folder = Path(text)
    with _trying(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UsageError(f"must be {'' if there == folder else 'in '}a folder, but {there} is a file")
        # Whatever the mode says, this is what is asked of it.
        tempfile.TemporaryFile(dir=there).close()
    return folder


@contextmanager
def _trying(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(f"must be a whole number of at least {least}, but got {text!r}")
    if number > MOST:
        raise UsageError(f"must be at most {MOST}, but got {text}")
    return number


def _number(text: str, wanted: str, right: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not right(number):
        raise UsageError(f"must be {wanted}, but got {text!r}")
    return number
