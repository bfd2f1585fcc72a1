"""The micro-batches of one optimizer step after the other, or why they could not be had."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from vlmtune.data import PackSampler
from vlmtune.data.workers import WorkerBatches
from vlmtune.engine import ranks
from vlmtune.engine.data_failure import DataFailure, describe
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import DataError, TrainingError

MicroBatch = dict[str, Tensor]


class Fetched(NamedTuple):
    """What this rank has for a step.

    Attributes:
        micro_batches: of the step; none where there is a failure.
        failure: why this rank has no data.
    """

    micro_batches: list[MicroBatch]
    failure: DataFailure | None = None


class StepFeed:
    """Takes from a data loader what its sampler says a step is.

    Args:
        dataloader: a StepDataLoader.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        self.dataloader = dataloader
        self.sampler: PackSampler = dataloader.batch_sampler  # type: ignore[assignment]
        self._batches: Iterator[MicroBatch] | None = None

    def epoch_ended(self) -> bool:
        """Whether there is no further step in this epoch."""
        return self.sampler.next_step() == 0

    def start_epoch(self) -> None:
        """Go to the next epoch."""
        self.close()
        self.sampler.start_epoch(self.sampler.epoch + 1)

    def fetch(self) -> Fetched:
        """The micro-batches of the next step of this epoch. It raises nothing: all ranks have to hear of a failure."""
        found: list[MicroBatch] = []
        try:
            if self._batches is None:
                self._batches = iter(self.dataloader)
            while len(found) < self.sampler.next_step():
                found.append(next(self._batches))
        except Exception as error:  # told to all ranks, see stop_all
            loading = self._batches.loading() if isinstance(self._batches, WorkerBatches) else {}
            failure = describe(error, dataset=self.dataloader.dataset, pack=self._pack(len(found)), loading=loading)
            self.close(at_once=True)
            return Fetched([], failure)
        return Fetched(found)

    def _pack(self, number: int) -> list[SampleKey]:
        """A micro-batch of the step under way; of a stream nothing is known before its first window is read."""
        try:
            return self.sampler.current_packs()[number]
        except IndexError:
            return []

    def close(self, *, at_once: bool = False) -> None:
        """End the workers.

        Args:
            at_once: one of them hangs or has died.
        """
        if isinstance(self._batches, WorkerBatches):
            self._batches.close(at_once=at_once)
        self._batches = None


def stop_all(failure: DataFailure | None, *, iteration: int) -> None:
    """End all ranks with one message, because some of them have no data.

    Args:
        failure: of this rank.
        iteration: counted from 1.

    Raises:
        DataError: the data has to be mended.
        TrainingError: a worker has died or hangs, or the machine is in trouble.
    """
    told = ranks.gather(failure, what=f'telling why there is no data for iteration {iteration}')
    found = {rank: DataFailure(*one) for rank, one in enumerate(told) if one is not None}
    message = '; '.join(
        f'rank {rank} could not get its data at iteration {iteration}: {one.cause}' for rank, one in found.items()
    )
    error = (DataError if all(one.users for one in found.values()) else TrainingError)(message)
    error.told_by_first_rank = ranks.several()
    raise error
