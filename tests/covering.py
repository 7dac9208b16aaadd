"""Parametrisation by covering sets: every two values of different parameters meet, in few cases."""

from collections.abc import Callable
from itertools import combinations, product

import pytest


def covering(valid: Callable[..., bool] | None = None, indirect: tuple[str, ...] = (), **parameters):
    """``pytest.mark.parametrize`` for parameters that are independent of each other, by a greedy choice of cases.

    ``valid``: of the parameters by name, whether they can stand together. ``indirect``: those that are fixtures.
    """
    names = list(parameters)
    values = [list(each) for each in parameters.values()]
    rows = [
        row
        for row in product(*(range(len(each)) for each in values))
        if valid is None or valid(**{name: each[i] for name, each, i in zip(names, values, row, strict=True)})
    ]
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    cases = []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        cases.append(tuple(each[i] for each, i in zip(values, best, strict=True)))
    return pytest.mark.parametrize(names, cases, indirect=list(indirect), ids=lambda value: str(value))
