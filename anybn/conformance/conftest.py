import pytest

from anybn.conformance.targets import Target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the short selection that `python -m anybn check` runs")
    config.addinivalue_line("markers", "slow: takes long, and rarely fails where others pass; `-m 'not slow'` omits it")


@pytest.fixture
def target(anybn_target: Target) -> Target:
    """The backend and device under test."""
    return anybn_target
