"""What a state is set to: the conventions without which its arrays cannot be read."""

from __future__ import annotations

from typing import Any

from anybn import _settings
from anybn.core.call import dtype_name
from anybn.state.arrays import Arrays


class Settings:
    """The settings of a `BatchNormState`, which its store has; to be read, and some to be set."""

    __slots__ = ("_store",)

    _store: Any

    @property
    def _arrays(self) -> Arrays:
        return self._store.arrays  # type: ignore[no-any-return]

    @property
    def num_features(self) -> int:
        """C, the number of channels."""
        return self._store.num_features

    @property
    def dtype(self) -> str:
        """The name of weight's and bias's dtype. A state of float64 says "float32" where there is no float64, and
        has all its digits again where there is."""
        weight, bias = self._arrays[:2]
        parameter: Any = bias if weight is None else weight
        return dtype_name(parameter.dtype) if hasattr(parameter, "dtype") else self._store.dtype

    @property
    def affine(self) -> bool:
        """Whether there is a weight or a bias."""
        weight, bias, *_ = self._arrays
        return weight is not None or bias is not None

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self._arrays.running_mean is not None

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._store.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._store.eps = _settings.eps(value)

    @property
    def momentum(self) -> float | None:
        """The weight of a new batch; None for the average over all batches."""
        return self._store.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._store.momentum = _settings.momentum(value)

    @property
    def ddof(self) -> int:
        """``running_var`` averages ``m2 / (count - ddof)``."""
        return self._store.ddof

    @ddof.setter
    def ddof(self, value: int) -> None:
        self._store.ddof = _settings.ddof(value)

    def _settings(self) -> dict[str, Any]:
        """By the names under which a new state takes them."""
        weight, bias, running_mean = self._arrays[:3]
        affine = weight is not None or bias is not None
        return {
            "num_features": self.num_features,
            "eps": self.eps,
            "momentum": self.momentum,
            "affine": affine,
            "scale": weight is not None or not affine,
            "bias": bias is not None or not affine,
            "track_running_stats": running_mean is not None,
            "ddof": self.ddof,
            "dtype": self._store.dtype,
        }
