"""What is about ``fuse_`` runs on the kernels that users have: on a CPU those in C++."""

import pytest


@pytest.fixture(autouse=True)
def _in_cpp(in_cpp):
    pass
