"""The libraries that tests are of; where one is missing they are skipped with the reason."""

import pytest
from workloads import zoo


@pytest.fixture
def torchvision():
    try:
        return zoo.torchvision()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def timm(torchvision):
    """It needs torchvision."""
    return pytest.importorskip("timm")


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


@pytest.fixture
def transformers(accelerate):
    """Its Trainer needs accelerate."""
    return pytest.importorskip("transformers")
