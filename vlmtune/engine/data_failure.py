"""Why a rank could not get its data, on one line: neither a worker's traceback nor torch's wrapping of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlmtune.data.sample_places import in_words, places
from vlmtune.utils.errors import DataError, UserError

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


def describe(
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
