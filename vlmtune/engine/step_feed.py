"""The micro-batches of one optimizer step after the other, or why they could not be had."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from vlmtune.data import PackSampler
from vlmtune.data.sample_places import in_words, places
from vlmtune.data.workers import WorkerBatches
from vlmtune.engine import ranks
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import DataError, TrainingError, UserError

MicroBatch = dict[str, Tensor]
_TRACEBACK = 'Traceback (most recent call last):\n'
_KILLED = re.compile(r'DataLoader worker \(pid (\d+)\) is killed by signal: (.*?)\. ')
_EXITED = re.compile(r'DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) exited unexpectedly')
_LATE = re.compile(r'DataLoader timed out after ([\d.]+) seconds')


class DataFailure(NamedTuple):
    """What a rank tells the others.

    Attributes:
        cause: one line.
        users: whether it is the data that has to be mended.
    """

    cause: str
    users: bool


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
            failure = _describe(error, dataset=self.dataloader.dataset, pack=self._pack(len(found)), loading=loading)
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


def stop_all(failure: DataFailure | None, *, at: str) -> None:
    """End all ranks with one message, because some of them have no data.

    Args:
        failure: of this rank.
        at: the part of the run that needs it: 'iteration 3'.

    Raises:
        DataError: the data has to be mended.
        TrainingError: a worker has died or hangs, or the machine is in trouble.
    """
    told = ranks.gather(failure, what=f'telling why there is no data for {at}')
    found = {rank: DataFailure(*one) for rank, one in enumerate(told) if one is not None}
    message = '; '.join(f'rank {rank} could not get its data at {at}: {one.cause}' for rank, one in found.items())
    ranks.fail_everywhere((DataError if all(one.users for one in found.values()) else TrainingError)(message))


# ---- why there is none, on one line: neither a worker's traceback nor torch's wrapping of it


def _describe(
    error: Exception, *, dataset: Any, pack: Sequence[Any], loading: Mapping[int, str] | None = None
) -> DataFailure:
    """What went wrong, and with which samples.

    Args:
        error: as the data loader raised it.
        dataset: of the samples.
        pack: the micro-batch that was waited for; empty where it is not known.
        loading: the sample that each worker was at, by process id.
    """
    if isinstance(error, DataError):  # it names its sample
        return DataFailure(_of_worker(error), True)
    awaited = places(dataset, pack)
    text = '\n'.join(str(link) for link in _chain(error))
    if died := _KILLED.search(text) or _EXITED.search(text):
        sample = (loading or {}).get(int(died[1]))
        samples = sample or (f'{in_words(awaited)} or the ones after them' if awaited else '')
        return DataFailure(_with(_death(died), samples), False)
    if late := _LATE.search(text):
        cause = f'the data workers gave nothing for {float(late[1]):g} s (train_dataloader.timeout)'
        at = [sample for sample in (loading or {}).values() if sample.endswith(tuple(f'({p.where})' for p in awaited))]
        return DataFailure(_with(cause, at[0] if len(at) == 1 else in_words(awaited)), False)
    return DataFailure(_with(_of_worker(error), in_words(awaited)), False)


def _with(cause: str, samples: str) -> str:
    return f'{cause}, loading {samples}' if samples else cause


def _death(died: re.Match[str]) -> str:
    if died.re is _EXITED:
        return f'a data worker (pid {died[1]}) ended by itself'
    short = ', as the system does when memory is short' if died[2] == 'Killed' else ''
    return f'a data worker (pid {died[1]}) was ended by the signal "{died[2]}"{short}'


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_worker(error: Exception) -> str:
    """The message of an error, also of one that comes from a worker with its traceback."""
    text = str(error)
    if _TRACEBACK not in text:
        return _one_line(text if isinstance(error, UserError) and text else f'{type(error).__name__}: {text}')
    after = text.rpartition(_TRACEBACK)[2].splitlines()
    raised = next((number for number, line in enumerate(after) if line and not line[0].isspace()), 0)
    name, _, message = ' '.join(after[raised:]).partition(': ')
    short = name.rpartition('.')[2]
    return _one_line(message if isinstance(error, UserError) and message else f'{short}: {message}')


def _one_line(text: str) -> str:
    return ' '.join(text.split())[:2000]
