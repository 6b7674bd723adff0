import pytest


@pytest.fixture(params=["in one step", "on threads", "in general"])
def way(request, monkeypatch):
    """How a module's forward pass is done: what is small and what is special, whatever the tensor."""
    if request.param != "in one step":
        monkeypatch.setattr("anybn.torch.fast_forward.ONE_CLAIM", 0)
    if request.param == "in general":
        monkeypatch.setattr("anybn.torch.module.fast_forward", lambda *_: None)
    return request.param
