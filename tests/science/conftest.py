"""The experiments run on the kernels that users have, where they do not force Triton's."""

import pytest


@pytest.fixture(autouse=True)
def _in_cpp(in_cpp):
    pass
