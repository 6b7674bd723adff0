"""A module of anybn's beside torch's own, and how alike they have to be."""

import pytest

from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

import anybn.torch  # noqa: E402

nn, checkpoint = torch.nn, torch.utils.checkpoint.checkpoint
PAIRS = {1: (anybn.torch.BatchNorm1d, nn.BatchNorm1d), 2: (anybn.torch.BatchNorm2d, nn.BatchNorm2d)}
PAIRS[3] = (anybn.torch.BatchNorm3d, nn.BatchNorm3d)
SHAPES = {1: [(6, 3), (6, 3, 5)], 2: [(6, 3, 5, 4)], 3: [(6, 3, 2, 5, 4)]}
X = torch.from_numpy(inputs.normal((6, 3, 5, 4)) * 2 + 1).float()
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}]


def pair(dimensions=2, channels=3, **options):
    """The same module, anybn's and torch's; in float64, where torch's own is accurate enough to compare with."""
    return tuple(kind(channels, dtype=torch.float64, **options) for kind in PAIRS[dimensions])


def assert_close(a, b):
    """To a few roundings of float64, of numbers around 1 and sums of a hundred of them."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def assert_same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value)


def buffers_of(module):
    return [b.clone() for b in module.buffers()]
