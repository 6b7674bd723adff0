"""A pytest plugin for runs of a framework's own tests: its batch norm is anybn's, as ANYBN_SWAP names the framework.

ANYBN_SWAP=keras python -m pytest -c /dev/null -p frameworks_own.swap --pyargs keras.src.layers....
"""

import os


def _keras():
    import keras
    from keras.src import layers

    import anybn.keras

    for module in (layers, keras.layers):
        module.BatchNormalization = anybn.keras.BatchNormalization


def _flax():
    from flax import linen, nnx

    import anybn.flax

    nnx.BatchNorm, linen.BatchNorm = anybn.flax.BatchNorm, anybn.flax.LinenBatchNorm


def _equinox():
    import equinox as eqx

    import anybn.equinox

    eqx.nn.BatchNorm = anybn.equinox.BatchNorm


def _haiku():
    from haiku._src import batch_norm

    import anybn.haiku

    batch_norm.BatchNorm = anybn.haiku.BatchNorm


def pytest_configure():
    {"keras": _keras, "flax": _flax, "equinox": _equinox, "haiku": _haiku}[os.environ["ANYBN_SWAP"]]()
