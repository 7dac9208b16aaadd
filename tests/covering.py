"""Parametrisation by covering sets: every two values of different parameters meet, in few cases."""

from collections.abc import Callable
from itertools import combinations, product

import pytest

# Of the fixture of this name: both ways to launch a training node.
LAUNCHES = ("separate launches", "one launch")


def covering(
    valid: Callable[..., bool] | None = None,
    indirect: tuple[str, ...] = (),
    together: tuple[str, ...] = (),
    **parameters,
):
    """``pytest.mark.parametrize`` for parameters that are independent of each other, by a greedy choice of cases.

    ``valid``: of the parameters by name, whether they can stand together. ``indirect``: those that are fixtures.
    ``together``: those of which all values meet, not just every two.
    """
    names = list(parameters)
    values = [list(each) for each in parameters.values()]
    rows = [
        row
        for row in product(*(range(len(each)) for each in values))
        if valid is None or valid(**{name: each[i] for name, each, i in zip(names, values, row, strict=True)})
    ]
    whole = [names.index(name) for name in together]
    pairs = {row: {*combinations(enumerate(row), 2), tuple((i, row[i]) for i in whole)} for row in rows}
    missing = set().union(*pairs.values())
    cases = []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        cases.append(tuple(each[i] for each, i in zip(values, best, strict=True)))
    ids = ["-".join(map(_label, names, case)) for case in cases]
    return pytest.mark.parametrize(names, cases, indirect=list(indirect), ids=ids)


def _label(name: str, value: object) -> str:
    if name == "training":
        return "training" if value else "frozen"
    return str(value)
