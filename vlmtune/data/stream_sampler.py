"""Which packs of a stream every rank takes, and where the stream stands."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vlmtune.data.packing import Plan, check_patches, plan_hash
from vlmtune.data.row_streams import StreamRow
from vlmtune.data.streaming import StreamingDataset, StreamKey
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError


class WindowStart(NamedTuple):
    """Where a window begins: how often the source was read through, the window's number, the source's position."""

    passes: int = 0
    number: int = 0
    position: tuple[int, ...] = ()


@dataclass(frozen=True)
class Window:
    """The packs of some rows, and where the next window begins."""

    place: WindowStart
    packs: list[list[StreamKey]]
    hash: str
    after: WindowStart


class WindowReader:
    """Makes windows, each from where the last one ended.

    Args:
        dataset: plans rows.
        plan: called as ``plan(lengths, patches=, epoch=)``.
        max_patches: what a sample may have.
    """

    def __init__(self, dataset: StreamingDataset, plan: Callable[..., Plan], *, max_patches: int | None = None) -> None:
        self.dataset, self._plan, self._max_patches = dataset, plan, max_patches
        self._open: tuple[tuple[int, ...], Iterator[StreamRow]] | None = None

    def read(self, place: WindowStart) -> Window:
        """The window that begins at ``place``; one of no packs where the source ends there."""
        if self._open is None or self._open[0] != place.position:
            self._open = (place.position, self.dataset.stream.read(place.position))
        rows = list(islice(self._open[1], self.dataset.shuffle_window))
        ended = len(rows) < self.dataset.shuffle_window
        after = WindowStart(place.passes + 1) if ended else WindowStart(place.passes, place.number + 1, rows[-1].after)
        self._open = None if ended else (after.position, self._open[1])
        keys = self.dataset.plan(rows, epoch=place.passes) if rows else []
        lengths = np.array([len(key.sample.planned) for key in keys], dtype=np.int64)
        patches = np.array([key.sample.planned.patches for key in keys], dtype=np.int64)
        check_patches(patches, max_patches=self._max_patches, name=lambda index: keys[index].sample.where)
        plan = self._plan(lengths, patches=patches, epoch=(place.passes << 32) + place.number) if keys else []
        sizes = hashlib.sha256(np.concatenate([lengths, patches]).tobytes()).hexdigest()
        packs = [[keys[index] for index in pack] for pack in plan]
        return Window(place, packs, f'{plan_hash(plan)}{sizes[:16]}', after)

    def windows(self, first: Window) -> Iterator[Window]:
        """``first`` and all that follow it, for ever.

        Raises:
            DataError: not one row of the whole source can be used.
        """
        window, samples = first, 0
        while True:
            samples += len(window.packs)
            if window.packs:
                yield window
            if window.after.passes > window.place.passes:
                if not samples:
                    raise DataError('not one row of the stream can be used; the log says why')
                samples = 0
            window = self.read(window.after)


class _Placed(NamedTuple):
    """A pack, and which one of its window it is."""

    pack: list[StreamKey]
    window: Window
    number: int


class StreamSampler(Sampler[list[StreamKey]]):
    """The batch sampler of a stream, with the doors of PackSampler.

    Every rank reads and plans the whole stream and takes its share of the packs of every step. The state is where the
    window of the next pack begins and how many of its packs are consumed, so that a resume plans one window.

    Args:
        dataset: the stream.
        plan: called as ``plan(lengths, patches=, epoch=)`` for every window.
        accumulative_counts: micro-batches per rank and optimizer step.
        rank, world_size: of this process.
        max_patches: what a sample may have.
    """

    endless = True  # there are no epochs to count
    epoch = 0
    batch_size = 1  # packs per micro-batch; mmengine asks for it

    def __init__(
        self,
        dataset: StreamingDataset,
        plan: Callable[..., Plan],
        *,
        accumulative_counts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        max_patches: int | None = None,
    ) -> None:
        self.accumulative_counts = accumulative_counts
        self.rank, self.world_size = rank, world_size
        self._reader = WindowReader(dataset, plan, max_patches=max_patches)
        self._window: Window | None = None  # of the next pack that was not consumed
        self._consumed = 0  # packs of it, over all ranks
        self._handed_out: deque[list[_Placed]] = deque()  # steps that were not finished

    @property
    def packs_per_step(self) -> int:
        """Packs of an optimizer step, over all ranks."""
        return self.world_size * self.accumulative_counts

    @property
    def window(self) -> Window:
        """The window that the next pack is in."""
        if self._window is None:
            self._window = self._reader.read(WindowStart())
        return self._window

    def steps_in_epoch(self, epoch: int) -> int:
        """Nothing that could be counted.

        Raises:
            ConfigError: always.
        """
        raise ConfigError('a stream has no epochs; set max_steps, and max_epochs=None')

    def __len__(self) -> int:
        """More than any run takes; mmengine compares with it."""
        return 2**62

    def next_step(self) -> int:
        """Micro-batches per rank of the next optimizer step."""
        return self.accumulative_counts

    def finish_step(self) -> None:
        """The packs of one optimizer step have been learned."""
        last = self._handed_out.popleft()[-1]
        self._window, self._consumed = last.window, last.number + 1

    def current_packs(self) -> list[list[StreamKey]]:
        """This rank's micro-batches of the step that is being learned, until ``finish_step`` is called."""
        return self._share(self._handed_out[0])

    def __iter__(self) -> Iterator[list[StreamKey]]:
        """Micro-batches of this rank, from the first pack that was not consumed, for ever."""
        self._handed_out.clear()
        packs = self._packs()
        while True:
            step = list(islice(packs, self.packs_per_step))
            self._handed_out.append(step)
            yield from self._share(step)

    def _packs(self) -> Iterator[_Placed]:
        skip = self._consumed
        for window in self._reader.windows(self.window):
            for number in range(skip, len(window.packs)):
                yield _Placed(window.packs[number], window, number)
            skip = 0

    def _share(self, step: list[_Placed]) -> list[list[StreamKey]]:
        return [placed.pack for placed in step[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, in plain numbers."""
        passes, number, position = self.window.place
        return dict(
            passes=passes, window=number, position=list(position), consumed=self._consumed, plan=self.window.hash
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; reads and plans one window.

        Raises:
            CheckpointError: the rows there, the lengths or the packing settings are not those of the saved run.
        """
        position = tuple(int(number) for number in state['position'])
        self._window = self._reader.read(WindowStart(int(state['passes']), int(state['window']), position))
        self._consumed = int(state['consumed'])
        if self._window.hash != state['plan']:
            raise CheckpointError(
                f'the data of this run is not that of the checkpoint (plan {self._window.hash}, '
                f'saved {state["plan"]}); the source, the tokenizer, max_length, packing, shuffle_window or seed '
                'differ: restore them, or use load_from'
            )
        if not 0 <= self._consumed <= len(self._window.packs):
            raise CheckpointError(
                f'the checkpoint stands at pack {self._consumed} of a window that has {len(self._window.packs)}'
            )
