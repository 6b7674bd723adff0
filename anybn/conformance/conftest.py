import pytest

from anybn.conformance.targets import Target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the short selection that `python -m anybn check` runs")


@pytest.fixture
def target(anybn_target: Target) -> Target:
    """The backend and device under test."""
    return anybn_target
