import pytest

from anybn.conformance.targets import Target


@pytest.fixture
def target(anybn_target: Target) -> Target:
    """The backend and device under test."""
    return anybn_target
