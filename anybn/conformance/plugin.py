"""The pytest option that chooses backends. Loaded by every pytest run (entry point), so it holds nothing else."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("anybn").addoption(
        "--anybn-backend",
        action="append",
        metavar="NAME",
        help="backend to run anybn's conformance suite on: numpy, torch, torch:cuda, cupy, jax, dask, "
        "array_api_strict, or a registered one. Repeat it, or separate names by commas. A backend asked for that is "
        "missing is an error; the default is every installed one.",
    )
