"""Every comparison of the kernels with an oracle, on those in C++: the tests of these modules, collected once more."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "operator"))

from test_accuracy import *  # noqa: F403
from test_activations import *  # noqa: F403
from test_activations import _exact_oracle  # noqa: F401
from test_functional import *  # noqa: F403
from test_gradients import *  # noqa: F403
from test_memory import *  # noqa: F403
from test_pytorch_cases import *  # noqa: F403

import resfused

# About one launch alone.
del test_a_ragged_last_slice_writes_nothing_beside_it  # noqa: F821


@pytest.fixture(autouse=True)
def _native(_reproducible):
    with resfused.use_backend("native"):
        yield


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture
def small_launches():
    """There is nothing to set: parts and tails are those of the shapes."""


@pytest.fixture
def launches():
    """There is one way to run a node."""
