"""Everything public says what it is."""

import importlib
import inspect

import pytest

FRAMEWORKS = "torch", "jax", "flax", "equinox", "haiku", "keras"
MODULES = "variants", "norms", "interop", "distributed", "diagnosis", "backends", *FRAMEWORKS


@pytest.mark.parametrize("name", ["anybn", *(f"anybn.{name}" for name in MODULES)])
def test_a_docstring_for_everything_public(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    if (framework := name.removeprefix("anybn.")) in FRAMEWORKS:
        pytest.importorskip(framework, reason=f"{framework}: not installed")
    module = importlib.import_module(name)
    things = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    classes = {name: thing for name, thing in things.items() if inspect.isclass(thing)}
    functions = {name: thing for name, thing in things.items() if inspect.isroutine(thing)}
    missing = [name for name, thing in {**classes, **functions}.items() if not thing.__doc__]
    missing += [f"{name}.{member}" for name, cls in classes.items() for member in members_without_words(cls)]
    assert inspect.getdoc(module)
    assert missing == []


def members_without_words(cls):
    """Public methods and properties of its own; one that overrides may leave the words to what it overrides."""
    for name, member in vars(cls).items():
        called = isinstance(member, property | staticmethod | classmethod) or inspect.isroutine(member)
        if called and not name.startswith("_"):
            inherited = (vars(base).get(name) for base in cls.__mro__[1:])
            if not any(inspect.getdoc(found) for found in (member, *inherited) if found is not None):
                yield name
