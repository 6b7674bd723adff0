"""Which backend gets an array; third-party backends; and the suite's verdict on good and faulty ones."""

import decimal
import gc
import json
import os
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest

import anybn
from anybn.backends import Backend, registry
from anybn.backends.numpy import NumPyBackend


@pytest.fixture
def registered():
    names = []

    def register(backend):
        anybn.register_backend(backend)
        names.append(backend.name)

    yield register
    for name in names:
        anybn.unregister_backend(name)


class Recording(NumPyBackend):
    name = "recording"
    calls = 0

    def statistics(self, call):
        type(self).calls += 1
        return super().statistics(call)


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def all_reduce_sum(self, array):
        return array


class Heedless(NumPyBackend):
    name = "heedless"

    def train(self, call):
        return super().train(call._replace(group=None))


def test_a_backend_that_overlooks_the_group_is_told(registered):
    registered(Heedless)
    x, state = np.random.default_rng(0).normal(size=(8, 2)), anybn.BatchNormState(2)
    with pytest.raises(RuntimeError, match=r"the heedless backend has overlooked call\.group"):
        anybn.batch_norm(x, state, training=True, group=Alone())
    assert state.num_batches_tracked == 0
    with anybn.use_backend("numpy"):
        anybn.batch_norm(x, state, training=True, group=Alone())
    assert state.num_batches_tracked == 1


def test_registered_backends_come_first_and_can_be_chosen(registered):
    x = np.ones((4, 2))
    registered(Recording)
    anybn.moments(x)
    assert Recording.calls == 1
    assert anybn.backends()["recording"].usable
    with anybn.use_backend("numpy"):
        anybn.moments(x)
    assert Recording.calls == 1
    anybn.BatchNormState(2).to("recording")


def test_use_backend_leaves_other_libraries_alone():
    torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    with anybn.use_backend("numpy"):
        assert isinstance(anybn.moments(torch.ones(4, 2)).mean, torch.Tensor)


def test_names_that_are_no_backend():
    with pytest.raises(ValueError, match="backend 'json' is not known; known are numpy, "), anybn.use_backend("json"):
        pass
    with pytest.raises(ValueError, match="no backend 'numpy' was registered"):
        anybn.unregister_backend("numpy")
    with pytest.raises(TypeError, match=r"register_backend needs a subclass of Backend, from anybn.backends"):
        anybn.register_backend(object)


def test_a_known_library_that_is_missing(monkeypatch):
    monkeypatch.delitem(registry._loaded, "torch", raising=False)
    for name in [name for name in sys.modules if name.startswith("anybn.backends.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    state = anybn.BatchNormState(2)
    with pytest.raises(anybn.BackendNotInstalled, match=r"torch cannot be imported .*: pip install torch") as caught:
        state.to("torch")
    assert isinstance(caught.value, ImportError)
    assert isinstance(state.weight, np.ndarray)


def test_every_library_that_is_missing_is_named_with_its_pip_line():
    code = """
import sys, anybn
from anybn.backends import Backend, registry
for name in registry.libraries()[1:]:
    sys.modules[name] = None
    try:
        registry.backend_named(name)
    except anybn.BackendNotInstalled as error:
        assert str(error).endswith(registry.installation_of(name)), error
        print(name)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(run.stdout.split()) == registry.libraries()[1:]


def test_a_backend_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "decimal.py").write_text(textwrap.dedent('''
        from anybn.backends._needs import needs
        from anybn.backends.base import Backend
        from anybn.backends.numpy import NumPyBackend  # owns nothing here: it has another name

        with needs("decimal", pip="nothing"):
            import decimal

        class DecimalBackend(Backend):
            name = "decimal"
            libraries = ("decimal",)
    '''))  # fmt: skip
    monkeypatch.setattr("anybn.backends.__path__", [*anybn.backends.__path__, str(tmp_path)])
    registry.libraries.cache_clear()
    try:
        assert registry.libraries()[0] == "numpy"
        assert type(registry.backend_for(decimal.Decimal(1))).__name__ == "DecimalBackend"
        assert registry.installation_of("decimal") == "pip install nothing"
    finally:
        registry.libraries.cache_clear()
        for remembered, key in (registry._loaded, "decimal"), (registry._by_type, decimal.Decimal):
            remembered.pop(key, None)
        sys.modules.pop("anybn.backends.decimal", None)


def test_arrays_of_jaxlib_are_jaxs(monkeypatch):
    """Whatever their type is called: their namespace says whose they are."""
    jax = pytest.importorskip("jax", reason="jax: not installed, pip install jax")
    backend = registry.backend_named("jax")
    monkeypatch.setattr(type(backend), "owns", Backend.owns)
    cls = type("Array", (), {"__module__": "jaxlib.elsewhere", "__array_namespace__": lambda _: jax.numpy})
    assert registry.backend_for(cls()) is backend
    registry._by_type.pop(cls)


def test_classes_made_for_one_array_do_not_pile_up():
    made = [weakref.ref(made_for_one_array(i)) for i in range(600)]
    gc.collect()
    assert sum(cls() is not None for cls in made) <= 256


def made_for_one_array(i):
    cls = type(f"Array{i}", (np.ndarray,), {})
    anybn.moments(np.zeros((3, 2)).view(cls))
    return cls


def test_devices_that_are_not_there():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict: pip install array-api-strict")
    with pytest.raises(ValueError, match=r"array_api_strict has no device 'device9'; it has .*device1"):
        anybn.BatchNormState(2).to("array_api_strict:device9")
    state = anybn.BatchNormState(2).to("array_api_strict:device1")
    assert state.weight.device == strict.Device("device1")


def test_any_array_namespace(monkeypatch):
    """ndonnx, cubed and their like: here array-api-strict as a library that has no file of its own."""
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict: pip install array-api-strict")
    others = tuple(name for name in registry.libraries() if name != "array_api_strict")
    monkeypatch.setattr(registry, "libraries", lambda: others)
    monkeypatch.delitem(registry._loaded, "array_api_strict", raising=False)
    registry._by_type.pop(type(strict.ones(1)), None)
    state = anybn.BatchNormState(2)
    y = anybn.batch_norm(strict.asarray([[1.0, 2.0], [3.0, 6.0]]), state, training=True)
    assert isinstance(y, type(strict.ones(1)))
    assert isinstance(state.weight, type(strict.ones(1)))
    assert "array_api_strict" in repr(state)
    registry._by_type.pop(type(y), None)


OFFERS = """
import json, sys, warnings, numpy as np
sys.modules |= dict.fromkeys(("torch", "jax", "dask"))  # as if they were not installed: they take long to import
import anybn
warnings.simplefilter(sys.argv[1])
with warnings.catch_warnings(record=sys.argv[1] == "always") as caught:
    try:
        backends = [type(anybn.backends.registry.backend_for(np.ones(1))).__name__ for _ in range(2)]
    except RuntimeWarning as error:
        backends = [str(error)]
try:
    anybn.BatchNormState(2).to("broken")
except anybn.BackendNotInstalled as error:
    asked = str(error)
found = {name: info.problem for name, info in anybn.backends().items() if "bro" in name or name == "good"}
print(json.dumps([backends, [str(w.message) for w in caught or ()], asked, found]))
"""


@pytest.fixture
def offers(tmp_path):
    """Four packages that offer backends: one that works, and three that do not, each in its way."""
    modules = {
        "broken": "import a_library_that_is_not_there",
        "brown": "Brown = 3",
        "broth": "class Broth:\n    def __init__(self): raise OSError('no driver')",
        "good": "from anybn.backends.numpy import NumPyBackend\nclass Good(NumPyBackend):\n    name = 'good'",
    }
    for name, code in modules.items():
        (tmp_path / f"{name}_module.py").write_text(code)
        folder = tmp_path / f"{name}_package-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[anybn.backends]\n{name} = {name}_module:{name.title()}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(anybn.__file__).parents[1])])}


@pytest.mark.parametrize("filter", ["always", "error"])
def test_a_broken_package_is_one_warning_and_the_others_are_there(offers, filter):
    run = subprocess.run([sys.executable, "-c", OFFERS, filter], env=offers, capture_output=True, text=True, check=True)
    backends, warned, asked, found = json.loads(run.stdout)
    if filter == "always":
        assert backends == ["Good", "Good"]
        assert len(warned) == 3
        (of_broken,) = (message for message in warned if "'broken'" in message)
    else:
        (of_broken,) = backends  # raised for whoever asks for that
    assert of_broken == (
        "anybn goes on without the backend 'broken': the package broken-package offers it, but it cannot be loaded "
        "(ModuleNotFoundError: No module named 'a_library_that_is_not_there'); update broken-package or uninstall it"
    )
    assert "broken-package offers it, but it cannot be loaded" in asked
    assert found["good"] == ""
    assert "No module named 'a_library_that_is_not_there'" in found["broken"]
    assert "backend is 3; register_backend needs a subclass" in found["brown"]
    assert "OSError: no driver" in found["broth"]


def test_info_lists_a_broken_package(offers):
    run = subprocess.run(
        [sys.executable, "-m", "anybn", "info"], env=offers, capture_output=True, text=True, check=True
    )
    assert re.search("^broken .*not usable: the package broken-package offers it, but", run.stdout, re.M)
    assert re.search("^numpy .* cpu$", run.stdout, re.M)


TOY = '''
"""A third-party backend for NumPy arrays, registered as a pytest plugin."""
import numpy as np
import anybn
from anybn.core.call import Statistics
from anybn.backends.numpy import NumPyBackend

class Toy(NumPyBackend):
    name = "toy"
    def _kernels_for(self, call):
        return None  # through the core, whose steps the faults below replace
{fault}

anybn.register_backend(Toy)
'''
FAULTS = {
    "none": "",
    "a biased running_var": """
    def statistics(self, call):
        s = super().statistics(call)
        return s._replace(m2=s.m2 * (s.count - 1) / s.count)
""",
    "E[x^2] - E[x]^2": """
    def statistics(self, call):
        s, x = super().statistics(call), call.x
        axes = tuple(i for i in range(x.ndim) if i != call.spec.axis)
        if call.mask is None:
            mean = x.mean(axes)
            var = (x * x).mean(axes) - mean * mean
            s = s._replace(mean=mean, var=var, m2=var * s.count)
        return s
""",
    "x * scale + shift": """
    def evaluate(self, call, statistics):
        y = super().evaluate(call, statistics)
        x, spec, weight, bias, residual, mask, _, _, out = call
        if residual is None and weight is not None and not spec.relu and mask is None and out is None:
            scale = (weight / np.sqrt(statistics.var + spec.eps)).astype(x.dtype)
            shift = (bias - statistics.mean * scale).astype(x.dtype)
            axes = [1] * x.ndim; axes[spec.axis] = -1
            y = x * scale.reshape(axes) + shift.reshape(axes)
        return y
""",
    "a gradient without the statistics": """
    def gradients(self, call, statistics, *rest):
        return super().gradients(call, statistics._replace(count=None), *rest)
""",
    "a write to x": """
    def evaluate(self, call, statistics):
        y = super().evaluate(call, statistics)
        x = call.x
        x += 1
        return y
""",
    "results in another dtype": """
    def evaluate(self, call, statistics):
        return super().evaluate(call, statistics).astype(np.float64)
""",
    "NaN to zero": """
    def evaluate(self, call, statistics):
        return np.nan_to_num(super().evaluate(call, statistics))
""",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_suite_passes_a_good_backend_and_rejects_faulty_ones(fault, tmp_path):
    (tmp_path / "toy_backend.py").write_text(TOY.format(fault=textwrap.indent(textwrap.dedent(FAULTS[fault]), "    ")))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "anybn.conformance", "--anybn-backend=toy", "-q", "-x",
         "-p", "toy_backend", "-k", "not ten_million"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == (0 if fault == "none" else 1), run.stdout[-3000:] + run.stderr[-2000:]
    assert (" passed" if fault == "none" else " failed") in run.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorflow", "backend 'tensorflow' is not known"), ("numpy,nonsense", "backend 'nonsense' is not known")],
)
def test_a_backend_that_was_asked_for_and_is_missing_is_an_error(name, message):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "anybn.conformance", f"--anybn-backend={name}", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode not in (0, 5)
    assert message in run.stdout + run.stderr
    assert "skipped" not in run.stdout
