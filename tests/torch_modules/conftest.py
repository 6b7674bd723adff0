import pytest


@pytest.fixture(params=["as planned", "in parts", "in general"])
def way(request, monkeypatch):
    """How a module's forward and backward passes are done: what is small, what is large, what is special."""
    if request.param == "in parts":
        plan = pytest.importorskip("anybn.kernels.cpu.plan")
        step = pytest.importorskip("anybn.kernels.cpu.step", reason="numba: not installed, pip install 'anybn[fast]'")
        caches = (plan.plan_of, step.steps_of)
        monkeypatch.setattr(plan, "CACHE", 0)
        monkeypatch.setattr(plan, "GRAIN", 64)
    else:
        caches = ()
    if request.param == "in general":
        monkeypatch.setattr("anybn.torch.module.fast_forward", lambda *_: None)
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()
