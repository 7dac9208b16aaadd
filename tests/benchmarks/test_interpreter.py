"""The interpreter's patch of Triton's language: once for each module of kernels, and only where it is what we know."""

import pytest
from triton.runtime import interpreter as tritons
from workloads import interpreter

pytestmark = pytest.mark.interpreter


def test_each_module_of_kernels_is_patched_once(monkeypatch):
    calls = []
    monkeypatch.setattr(tritons, "_patch_lang", lambda fn: calls.append(fn))
    assert interpreter.keep_patches()
    for fn in (interpreter.keep_patches, interpreter.keep_patches, pytest.fixture):
        tritons._patch_lang(fn).restore()
    assert calls == [interpreter.keep_patches, pytest.fixture]


def test_a_triton_that_patches_otherwise_is_left_alone(monkeypatch):
    for other in (lambda module, builder: None, None):
        monkeypatch.setattr(tritons, "_patch_lang", other)
        assert not interpreter.keep_patches()
        assert tritons._patch_lang is other
    monkeypatch.delattr(tritons, "_patch_lang")
    assert not interpreter.keep_patches()
