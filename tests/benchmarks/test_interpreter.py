"""What is left out of Triton's interpreter, and that it is only where Triton is what we know."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter as tritons
from workloads import interpreter

pytestmark = pytest.mark.interpreter


@pytest.fixture
def patches(monkeypatch):
    """The modules that Triton's own function is asked to patch the language for; all is undone after the test."""
    calls = []
    monkeypatch.setattr(tritons, "_patch_lang", lambda fn: calls.append(fn))
    monkeypatch.setattr(tritons, "_get_np_dtype", tritons._get_np_dtype)
    monkeypatch.setattr(tritons.interpreter_builder, "options", tritons.InterpreterOptions())
    return calls


def test_each_module_of_kernels_is_patched_once(patches):
    assert interpreter.speed_up()
    for fn in (interpreter.speed_up, interpreter.speed_up, pytest.fixture):
        tritons._patch_lang(fn).restore()
    assert patches == [interpreter.speed_up, pytest.fixture]


def test_integers_are_computed_once(patches):
    assert tritons.interpreter_builder.options.sanitize_overflow
    assert interpreter.speed_up()
    assert not tritons.interpreter_builder.options.sanitize_overflow


def test_dtypes_are_those_of_numpy(patches):
    assert interpreter.speed_up()
    for scalar, kind in ((tl.float64, np.float64), (tl.bfloat16, np.uint16), (tl.pointer_type(tl.int8), np.uint64)):
        for _ in range(2):
            assert tritons._get_np_dtype(scalar) == kind
            assert tritons._get_np_dtype(tl.block_type(scalar, [2])) == kind


def test_a_triton_that_patches_otherwise_is_left_alone(patches, monkeypatch):
    dtypes, options = tritons._get_np_dtype, tritons.interpreter_builder.options
    for other in (lambda module, builder: None, None):
        monkeypatch.setattr(tritons, "_patch_lang", other)
        assert not interpreter.speed_up()
        assert tritons._patch_lang is other
    monkeypatch.delattr(tritons, "_patch_lang")
    assert not interpreter.speed_up()
    assert (tritons._get_np_dtype, tritons.interpreter_builder.options) == (dtypes, options)
