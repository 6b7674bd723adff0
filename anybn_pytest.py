"""The pytest option that chooses backends, and the ``target`` argument that tests get.

Every pytest run in the environment loads this module (entry point). So it lies outside of the package, whose
`__init__` imports NumPy, and imports anybn only for tests that ask.
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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its workers
def pytest_sessionstart(session: pytest.Session) -> None:
    """A backend that is missing ends the run here, with one line, and not in each module of tests."""
    if names := session.config.getoption("--anybn-backend"):
        from anybn.conformance.targets import chosen_targets

        chosen_targets(names)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anybn_target" in metafunc.fixturenames:
        from anybn.conformance.targets import chosen_targets

        names = metafunc.config.getoption("--anybn-backend")
        metafunc.parametrize("anybn_target", chosen_targets(names))
