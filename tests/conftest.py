import sys
from collections.abc import Generator
from typing import Any

import pytest
from _pytest.doctest import DoctestModule
from compile_once import compile_once

from anybn.conformance.conftest import target

__all__ = ["target"]

compile_once()


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[Any], list[Any]]:
    """No examples in tests. Collecting them first would hide a test module that cannot be imported: pytest leaves out
    its examples, as it is told to for missing libraries, and then takes the half of it that is in ``sys.modules``."""
    found = yield
    return [collector for collector in found if not isinstance(collector, DoctestModule)]


@pytest.fixture(autouse=True)
def torch_compile_begins_anew() -> None:
    """torch.compile gives up after eight versions of one function, whichever tests of the process had them made."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch: not installed, pip install torch")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax", reason="jax: not installed, pip install jax")
