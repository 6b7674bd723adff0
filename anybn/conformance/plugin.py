"""The pytest option that chooses backends, and the ``target`` argument that tests get.

Every pytest run in the environment loads this module (entry point), so it does nothing unless a test asks.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("anybn").addoption(
        "--anybn-backend",
        action="append",
        metavar="NAME",
        help="backend to run anybn's conformance suite on, as `python -m anybn info` names it, on its first device or "
        "on one that is named: numpy, torch:cuda. Repeat it, or separate names by commas. A backend asked for that is "
        "missing is an error; the default is every device of every installed one.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the short selection that `python -m anybn check` runs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anybn_target" in metafunc.fixturenames:
        from anybn.conformance.targets import chosen_targets

        names = metafunc.config.getoption("--anybn-backend")
        metafunc.parametrize("anybn_target", chosen_targets(names))
