"""What the ranks of a run tell each other on the side, on the CPU, and never waiting without a bound.

Tensors of the model travel as the strategy has it. Here go the small things: whether a rank has failed, what it
counted, that all have come to the same point. Every rank notes in the store of the process group how many of these
exchanges it has entered and what for; when one does not end in time, the notes tell who is missing and what it was
doing.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vlmtune.engine.side_channel import DEFAULT_BOUNDS, Bounds, Channel, Failure, RankFailed, RankMissing
from vlmtune.utils.errors import UserError

__all__ = [
    'DEFAULT_BOUNDS', 'Bounds', 'RankFailed', 'RankMissing', 'explain', 'fail_everywhere', 'gather', 'join', 'leave',
    'linger', 'note', 'orphaned', 'several', 'store_is_torchruns', 'tell', 'together', 'total',
]  # fmt: skip


class _Joined:
    channel: Channel | None = None  # of this process, where there are other ranks


def join(store: dist.Store, *, bounds: Bounds) -> None:
    """Open the side channel; every rank calls it once, when the default process group is there."""
    _Joined.channel = Channel(store, bounds) if dist.get_world_size() > 1 else None


def leave() -> None:
    """Forget the side channel; the process group is about to be destroyed."""
    _Joined.channel = None


def several() -> bool:
    """Whether there are other ranks."""
    return _Joined.channel is not None


def orphaned() -> bool:
    """Whether torchrun, which had started this rank, has died: nobody else can end it any more."""
    if _Joined.channel is None or 'TORCHELASTIC_RUN_ID' not in os.environ:
        return False
    return os.getppid() != _Joined.channel.parent


def note(what: str) -> None:
    """Say what this rank is doing, for the message that others print if it never comes back."""
    if _Joined.channel is not None:
        _Joined.channel.note(what)


def total(values: Sequence[float], *, what: str) -> list[float]:
    """The sums over all ranks, in float64. Bounded as a step is.

    Raises:
        RankFailed: a rank has left with an error of its own.
        RankMissing: a rank did not come in time, or has died.
    """
    sums = torch.tensor(values, dtype=torch.float64)
    if _Joined.channel is not None:
        with _bounded(what, _Joined.channel.bounds.step):
            _wait(dist.all_reduce(sums, group=_Joined.channel.step, async_op=True))
    return sums.tolist()


def gather(value: Any, *, what: str) -> list[Any]:
    """One plain value of every rank, by rank. Bounded as all but steps is.

    Raises:
        RankFailed: a rank has left with an error of its own.
        RankMissing: a rank did not come in time, or has died.
    """
    values = [value]
    if _Joined.channel is not None:
        values = [None] * _Joined.channel.world_size
        with _bounded(what, _Joined.channel.bounds.other):
            _wait(dist.all_reduce(torch.zeros(1), group=_Joined.channel.other, async_op=True))  # all have come
            dist.all_gather_object(values, value, group=_Joined.channel.step)
    return values


@contextmanager
def together(what: str) -> Iterator[None]:
    """Something that all ranks do: if one fails, all fail, and the first rank can say why.

    Raises:
        RankFailed: another rank failed.
        RankMissing: a rank did not finish in time, or has died.
    """
    note(what)
    failure: Exception | None = None
    try:
        yield
    except (RankMissing, RankFailed):
        raise
    except Exception as error:  # told to the others below, and raised again
        failure = error
    messages = gather(None if failure is None else _in_words(failure), what=what)
    told = next((message for message in messages if message is not None), None)
    if told is None:
        return
    raised = failure or RankFailed(f'rank {messages.index(told)} failed while {what}: {told}')
    if isinstance(raised, UserError):  # of the first rank everybody sees the message
        raised.told_by_first_rank = several() and (failure is None or _in_words(failure) == told)
    raise raised


def fail_everywhere(error: UserError) -> NoReturn:
    """End all ranks with one message; every rank calls it with the same.

    Raises:
        UserError: always, the given one.
    """
    error.told_by_first_rank = several()
    raise error


def tell(error: BaseException) -> None:
    """Leave word of a failure that ends this rank, for those that will miss it."""
    if _Joined.channel is not None and not isinstance(error, RankMissing | RankFailed):
        _Joined.channel.tell(Failure(_Joined.channel.rank, False, _in_words(error)))


def linger(*, speaks: bool, seconds: float = 10.0) -> None:
    """Before this rank leaves with an error: wait until others have heard all they need.

    A launcher ends all processes when one has ended, also one that is about to speak; and who holds the store takes
    with it what the others would look up.

    Args:
        speaks: whether this rank prints its message; if not, it lets the first one end before it.
        seconds: at most.
    """
    if _Joined.channel is None:
        return
    holds_store = _Joined.channel.rank == 0 and not store_is_torchruns()
    awaited = [
        note
        for rank, note in enumerate(_Joined.channel.notes())
        if rank != _Joined.channel.rank and (holds_store or rank == 0)
    ]
    end = time.monotonic() + (seconds if not speaks else 3.0)
    while (holds_store or not speaks) and time.monotonic() < end:
        if all(note is None or note.ending() == 'has died' for note in awaited):
            return
        time.sleep(0.05)


def explain(error: RuntimeError, *, what: str, seconds: float | None = None) -> RankMissing | RankFailed:
    """Who is missing, from the notes of all ranks, after an exchange has failed.

    Args:
        error: of torch.
        what: the exchange was for.
        seconds: its bound.
    """
    assert _Joined.channel is not None
    failure = _Joined.channel.told()
    if failure is None:
        time.sleep(0.5)  # a process that was killed may still be seen, one that failed may be about to say so
        message = _who_is_missing(error, what=what, seconds=seconds)
        failure = _Joined.channel.tell(Failure(_Joined.channel.rank, True, message))
    return failure.error()


def _who_is_missing(error: RuntimeError, *, what: str, seconds: float | None) -> str:
    assert _Joined.channel is not None
    notes, mine = _Joined.channel.notes(), _Joined.channel.entered
    seen = f'seen by rank {_Joined.channel.rank} while {what}'
    if _Joined.channel.cut_off:
        return f'{"torchrun" if store_is_torchruns() else "rank 0"} has died; {seen}'
    gone, late = [], []
    for rank, noted in enumerate(notes):
        if noted is None:
            gone.append(f'rank {rank} has died before it said what it does')
            continue
        last = f'(last heard {time.time() - noted.when:.0f} s ago: {noted.what})'
        if (how := noted.ending()) is not None:
            gone.append(f'rank {rank} {how} {last}')
        elif noted.entered < mine:
            late.append(f'rank {rank} {last}')
    if gone:
        return f'{", ".join(gone)}; {seen}'
    if late:
        bound = '' if seconds is None else f' within {seconds:g} s'
        return f'{", ".join(late)} did not finish {what}{bound}; it hangs or has died'
    return f'the connection between ranks broke; {seen}: {error}'


def store_is_torchruns() -> bool:
    """Whether torchrun's process holds the store in which ranks meet; if not, the first rank does."""
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


@contextmanager
def _bounded(what: str, seconds: float) -> Iterator[None]:
    assert _Joined.channel is not None
    _Joined.channel.entered += 1
    _Joined.channel.note(what)
    try:
        yield
    except RuntimeError as error:
        raise explain(error, what=what, seconds=seconds) from error


def _wait(work: Any) -> None:
    """As ``work.wait()``, which would let no signal through; looks rarer the longer it takes."""
    start = time.monotonic()
    while not work.is_completed():
        time.sleep(min((time.monotonic() - start) / 20, 0.05))
    work.wait()


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'.removesuffix(': ')
