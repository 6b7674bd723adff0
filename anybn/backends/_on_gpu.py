"""A backend whose arrays are all a GPU's, over batchnorm.cu."""

from __future__ import annotations

from anybn.backends.base import Backend
from anybn.core.call import Array, Call, Gradients, Statistics, Update
from anybn.kernels.cuda.arrays import CudaArrays


class CudaBackend(Backend):
    """What the kernels do not take goes to the core, on the same device."""

    kernels: CudaArrays

    def _takes(self, call: Call) -> bool:
        return self.kernels.supports(call.x) and self.kernels.takes_mask(call)

    def statistics(self, call: Call) -> Statistics:
        if call.group is None and self._takes(call):
            return self.kernels.batch_statistics(call)
        return super().statistics(call)

    def train(self, call: Call) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
        if call.group is None and self._takes(call):
            return self.kernels.train(call)
        with self.kernels.on(call.x):
            return super().train(call)

    def evaluate(self, call: Call, statistics: Statistics) -> Array:
        if self._takes(call):
            return self.kernels.evaluate(call, statistics)
        with self.kernels.on(call.x):
            return super().evaluate(call, statistics)

    def gradients(
        self, call: Call, statistics: Statistics, dy: Array, active: Array | None, wants_residual: bool
    ) -> Gradients:
        if call.group is None and self._takes(call):
            return self.kernels.gradients(call, statistics, dy, active, wants_residual)
        with self.kernels.on(call.x):
            return super().gradients(call, statistics, dy, active, wants_residual)

    def update(self, update: Update, statistics: Statistics) -> tuple[Array, Array]:
        mean = update.running_mean
        if isinstance(statistics.count, int) and isinstance(update.momentum, (int, float)) and mean.size:
            new = self.kernels.updated_running_statistics(update, statistics)
        else:
            with self.kernels.on(mean):
                new = super().update(update, statistics)
        self.kernels.note_update(mean)
        return new
