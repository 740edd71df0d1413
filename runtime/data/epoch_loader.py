"""`engine.dataloader`: a user's dataset, spread over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.datasets import Numbered, NumberedSamples
from dstrain.runtime.data.loader import Loader
from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.data.samples import Batch
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError


class EpochLoader:
    """This rank's micro-batches of a dataset, on its device. [Note: sample order]

    Each iteration goes on where the engine stands, also behind a checkpoint and in another number of ranks: until
    train.steps are done or, without that key, to the end of its epoch of len(dataset) // batch.global steps. Samples
    that do not fill a step come first in the next epoch.
    """

    def __init__(
        self, dataset: Numbered, job: JobConfig, comm: Communicator, where: Callable[[], tuple[int, int]]
    ) -> None:
        assert job.batch is not None
        self._samples = NumberedSamples(dataset, job.data.seed, job.data.shuffle)
        self._prefetch, self._device, self._where = job.data.prefetch, comm.device, where
        accumulation = job.batch.accumulation(comm.world_size)
        self._layout = BatchLayout(comm.rank, comm.world_size, job.batch.micro, accumulation)
        self._steps = job.train.steps
        self.steps_per_epoch = len(self._samples) // job.batch.global_
        if not self.steps_per_epoch:
            expected = f"at least batch.global = {job.batch.global_} samples"
            raise UsageError.mismatch("training_data", expected, str(len(self._samples)))

    def __len__(self) -> int:
        """Micro-batches that an iteration from here yields on this rank."""
        return self._steps_left() * self._layout.accumulation - self._where()[1]

    def __iter__(self) -> Iterator[Batch]:
        (first, begun), count = self._where(), len(self)
        with contextlib.closing(Loader(self._samples, self._layout, first, self._prefetch, self._device)) as loader:
            for _ in range(begun):  # an iteration was left within a step
                loader.next()
            for _ in range(count):
                yield loader.next()

    def _steps_left(self) -> int:
        done, _ = self._where()
        if self._steps is not None:
            return max(0, self._steps - done)
        return self.steps_per_epoch - done % self.steps_per_epoch
