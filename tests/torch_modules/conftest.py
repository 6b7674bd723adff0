import pytest


@pytest.fixture(params=["as planned", "in parts", "in Python", "in general"])
def way(request, monkeypatch):
    """How a module's passes are done: what is small, what is large, what the operator does not take, the special."""
    if request.param == "in general":
        monkeypatch.setattr("anybn.torch.module.fast_forward", lambda *_: None)
    if request.param == "in Python":
        monkeypatch.setattr("anybn.torch.fast_forward.through_operator", lambda *_: None)
    if request.param != "in parts":
        yield request.param
        return
    plan = pytest.importorskip("anybn.kernels.cpu.plan")
    step = pytest.importorskip("anybn.kernels.cpu.step", reason="numba: not installed, pip install 'anybn[fast]'")
    prepared = pytest.importorskip("anybn.kernels.cpu.prepared")
    monkeypatch.setattr(plan, "CACHE", 0)
    monkeypatch.setattr(plan, "GRAIN", 64)
    forget = plan.plan_of.cache_clear, step.steps_of.cache_clear, prepared.forget_plans
    for each in forget:
        each()
    yield request.param
    for each in forget:
        each()
