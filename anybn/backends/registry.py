"""Array type -> backend, found without importing anything that the user has not imported.

A type's backend is the first that owns it: those registered last come first, then the one whose file in this folder is
named after the type's library, then the Array API core for anything that has ``__array_namespace__``. What was found is
remembered per type.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from anybn._lock import undisturbed
from anybn.backends._needs import pip_line
from anybn.backends.array_api import ArrayAPIBackend
from anybn.backends.base import Backend, beside_values
from anybn.core.call import root_module
from anybn.errors import BackendNotInstalled

_registered: dict[str, Backend] = {}
_loaded: dict[str, Backend] = {}
_cores: dict[str, ArrayAPIBackend] = {}
_by_type: dict[type, Backend] = {}
_entry_points_read = False
#: Whether nobody has ever registered or preferred a backend, as is known once entry points have been read: then each
#: type's is the one in this folder. For callers to whom a call of `backend_for` is long, right after an operation.
built_in_alone = False
#: Why an entry point could not be loaded, by its name.
_broken: dict[str, str] = {}
_preferred: ContextVar[Backend | None] = ContextVar("anybn_preferred_backend", default=None)


@functools.cache
def libraries() -> tuple[str, ...]:
    """Those that have a file in this folder, NumPy first."""
    import pkgutil

    folder = importlib.import_module("anybn.backends").__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))
    found = [name for name in names if name not in ("array_api", "base", "registry")]
    return tuple(sorted(found, key=lambda name: name != "numpy"))


def register_backend(backend: Backend | type[Backend]) -> None:
    """Make a backend known, before all others for the arrays it owns.

    A package can do the same without being imported: an entry point in the group ``anybn.backends`` that names the
    class. A backend of the same name is replaced.

    Raises TypeError if it is not a `Backend` with a ``name`` and ``libraries``.

    >>> import numpy as np, anybn
    >>> from anybn.backends.numpy import NumPyBackend
    >>> class Loud(NumPyBackend):
    ...     name = "loud"
    ...     def statistics(self, call):
    ...         print("statistics of", call.x.shape)
    ...         return super().statistics(call)
    >>> anybn.register_backend(Loud)
    >>> moments = anybn.moments(np.ones((4, 2)))
    statistics of (4, 2)
    >>> anybn.unregister_backend("loud")
    """
    instance = backend() if isinstance(backend, type) else backend
    named = all(getattr(instance, attribute, None) for attribute in ("name", "libraries"))
    if not isinstance(instance, Backend) or not named:
        raise TypeError(
            f"backend is {backend!r}; register_backend needs a subclass of Backend, from anybn.backends, "
            "with a name and the root modules of its array types in libraries"
        )
    global built_in_alone
    built_in_alone = False
    _registered[instance.name] = instance
    _by_type.clear()


def unregister_backend(name: str) -> None:
    """Forget a backend that `register_backend` added. Raises ValueError if there is none of this name."""
    if name not in _registered:
        raise ValueError(f"no backend {name!r} was registered; registered are {sorted(_registered) or 'none'}")
    del _registered[name]
    _by_type.clear()


def _read_entry_points() -> None:
    """Register what packages offer. One that cannot be loaded is left out, with a warning; the others are not."""
    if not _entry_points_read:
        for message in undisturbed(_register_entry_points):  # last, since a filter may make an error of one
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _register_entry_points() -> list[str]:
    """What there is to warn of."""
    global _entry_points_read, built_in_alone
    from importlib.metadata import entry_points  # 15 ms, a third of what NumPy takes

    _entry_points_read, built_in_alone = True, not _registered
    warned = []
    for entry_point in entry_points(group="anybn.backends"):
        if entry_point.name in _registered:
            continue
        try:
            register_backend(entry_point.load())
        except Exception as error:  # another package's code may raise anything
            package = entry_point.dist.name if entry_point.dist else entry_point.module
            reason = f"the package {package} offers it, but it cannot be loaded ({type(error).__name__}: {error})"
            _broken[entry_point.name] = reason
            warned.append(
                f"anybn goes on without the backend {entry_point.name!r}: {reason}; update {package} or uninstall it"
            )
    return warned


def _built_in(name: str) -> Backend | None:
    """The backend that a file in this folder has under this name: "torch-native" lies in that of torch."""
    library = name.partition("-")[0]
    if name not in _loaded and library in libraries():
        module = undisturbed(functools.partial(importlib.import_module, f"anybn.backends.{library}"))
        for cls in tuple(vars(module).values()):
            if isinstance(cls, type) and issubclass(cls, Backend) and vars(cls).get("name") == name:
                _loaded[name] = cls()
                if cls.companion:
                    undisturbed(functools.partial(importlib.import_module, cls.companion))
    return _loaded.get(name)


def backend_named(name: str) -> Backend:
    """The backend of this name: registered, in this folder, or the core over an importable Array API namespace.

    Raises BackendNotInstalled for a known one that is missing, ValueError for an unknown one.
    """
    _read_entry_points()
    if name in _registered:
        return _registered[name]
    if name in _broken:
        raise BackendNotInstalled(f"backend {name!r} was asked for: {_broken[name]}")
    if (backend := _built_in(name) or _cores.get(name)) is not None:
        return backend
    if name.isidentifier() and _is_installed(name):
        module = importlib.import_module(name)
        if hasattr(module, "__array_namespace_info__"):
            return _core_over(module, name)
    raise ValueError(
        f"backend {name!r} is not known; known are {', '.join(known_backends())}, "
        "and any importable Array API namespace"
    )


def _core_over(namespace: Any, library: str) -> Backend:
    """The core for the arrays of a library that has no backend of its own."""
    name = getattr(namespace, "__name__", library)
    if name not in _cores:
        _cores[name] = ArrayAPIBackend(name, namespace, library)
    return _cores[name]


def backend_for(x: Any, argument: str = "x") -> Backend:
    """The backend that owns x. Raises TypeError, naming what is installed, if none does."""
    cls = type(x)
    preferred = _preferred.get()
    if preferred is not None and preferred.owns(cls):
        return preferred
    if (backend := _by_type.get(cls)) is None:
        if len(_by_type) == 256:  # keeps them alive, and some classes are made for one array; weak ones take 0.1 us
            _by_type.clear()
        backend = _by_type[cls] = _find(x, cls, argument)
    return backend


#: What frameworks wrap an array in: class -> the attribute, or method, that gives the array itself.
_WRAPPERS = {
    "keras.src.backend.common.variables.Variable": "value",
    "flax.nnx.variablelib.Variable": "get_value",
}


def unwrapped(x: Any) -> Any:
    """The array in a variable of Keras or Flax NNX, which gradients reach; anything else as it is."""
    if root_module(type(x)) in ("keras", "flax"):
        for cls in type(x).__mro__:
            if (attribute := _WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
                value = getattr(x, attribute)
                return value() if attribute.startswith("get") else value
    return x


def _find(x: Any, cls: type, argument: str) -> Backend:
    _read_entry_points()
    wrapper = next((a for base in cls.__mro__ if (a := _WRAPPERS.get(f"{base.__module__}.{base.__qualname__}"))), "")
    what = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
    if lost := beside_values(cls):
        raise TypeError(f"{argument} is a {what}, {lost}")
    for backend in reversed(_registered.values()):
        if backend.owns(cls):
            return backend
    roots = [root_module(base) for base in cls.__mro__]
    for root in filter(libraries().__contains__, roots):
        if (own := _built_in(root)) is not None and own.owns(cls):
            return own
        break  # the library has types that are not its plain arrays: NumPy's scalars and masked arrays
    else:
        if hasattr(x, "__array_namespace__") and unwrapped(x) is x and "sparse" not in roots:
            namespace = x.__array_namespace__()
            root = getattr(namespace, "__name__", "").partition(".")[0]  # "jax" where the type is jaxlib's
            if (own := _built_in(root)) is not None and own.owns(cls):
                return own
            return _core_over(namespace, roots[0])
    if wrapper:
        advice = f"pass the array in it, which gradients reach: {argument}.{wrapper}" + "()" * wrapper.startswith("get")
    elif isinstance(x, (list, tuple, int, float, complex)) or cls.__module__ == "numpy":
        advice = "wrap it with np.asarray"
    elif root_module(cls) in ("scipy", "sparse"):
        advice = "zeros do not stay zeros, so make it dense: x.toarray() or x.todense()"
    else:
        advice = "convert it first, e.g. with np.asarray"
    installed = ", ".join(name for name in libraries() if _is_installed(name))
    raise TypeError(
        f"{argument} is a {what}, not an array that anybn knows: {advice}. "
        f"Backends installed: {installed}, and any array with __array_namespace__"
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the ``with`` block, choose this backend for the arrays it owns; other arrays keep theirs.

    Holds for the current thread or task. ``"torch-native"`` is torch's own batch norm in the place of anybn's kernels,
    on any device and inside autograd: with anybn's settings, checks, relu and running statistics, but torch's accuracy.
    torch.compile does not look at it.

    Raises ValueError if the name is unknown, BackendNotInstalled if the library is missing.

    >>> import numpy as np, anybn
    >>> with anybn.use_backend("numpy"):
    ...     anybn.moments(np.array([[1.0], [3.0]])).mean
    array([2.])
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, a {type(name).__name__}; it must be the name of a backend")
    global built_in_alone
    token, built_in_alone = _preferred.set(backend_named(name)), False
    try:
        yield
    finally:
        _preferred.reset(token)


@dataclass(frozen=True)
class BackendInfo:
    """One line of ``anybn.backends()``.

    Attributes:
        name: what ``state.to(name)`` and ``use_backend(name)`` take.
        version: of the library.
        devices: those that can be used now, named as in ``state.to("name:device")``.
        how: how the work is done there.
        problem: why an installed library cannot be used, or "".
    """

    name: str
    version: str
    devices: tuple[str, ...]
    how: str
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether there is a device, and no problem."""
        return bool(self.devices) and not self.problem


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def installed_backends() -> dict[str, BackendInfo]:
    """``anybn.backends()``: what is installed, with versions and devices, by name. Imports what it reports on.

    >>> import anybn
    >>> anybn.backends()["numpy"].devices
    ('cpu',)
    """
    _read_entry_points()
    found = {}
    for name in dict.fromkeys((*libraries(), *_registered, *_broken)):
        if name in libraries() and name not in _registered and not _is_installed(name):
            continue
        try:
            backend = backend_named(name)
            devices, problem = tuple(backend.devices()), backend.problem()
            found[name] = BackendInfo(name, backend.version(), devices, backend.how, problem)
        except Exception as error:  # a broken installation may raise anything, and the others are still of interest
            problem = _broken.get(name) or f"{type(error).__name__}: {error}"
            found[name] = BackendInfo(name, "unknown", (), "", problem)
    return found


def installation_of(name: str) -> str:
    """The pip line of a backend, whether its library is missing or not."""
    with suppress(BackendNotInstalled):
        _built_in(name)
    return pip_line(name)


def known_backends() -> tuple[str, ...]:
    return tuple(dict.fromkeys((*libraries(), *_registered)))


def _backend_of_namespace(xp: Any) -> Backend:
    """The backend for the arrays that a namespace makes: ``numpy``, ``jax.numpy``, ``array_api_compat.torch``."""
    library = xp.__name__.rpartition("array_api_compat.")[2].partition(".")[0]
    _read_entry_points()
    for backend in reversed(_registered.values()):
        if library in backend.libraries:
            return backend
    return _built_in(library) or _core_over(xp, library)


def resolve_target(target: Any) -> tuple[Backend, Any]:
    """``"torch:cuda:0"``, a namespace or an array -> (backend, device)."""
    if isinstance(target, str):
        name, _, device = target.partition(":")
        backend = backend_named(name)
        return backend, backend.device(device)
    if isinstance(target, ModuleType) and hasattr(target, "asarray"):
        backend = _backend_of_namespace(target)
        return backend, backend.device("")
    backend = backend_for(target, "target")
    return backend, backend.device_of(target)
