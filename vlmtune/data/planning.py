"""One row -> what is known of it before training: its tokens, and the sizes of its images from their headers."""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from vlmtune.data.cut_samples import can_be_cut
from vlmtune.data.downloads import download
from vlmtune.data.images import Root, locate, read_image_size
from vlmtune.data.parallel import map_chunks
from vlmtune.data.processor import Processor
from vlmtune.data.sample_table import BAD, OK, OVERLONG, FileState, PlannedRow, to_batch
from vlmtune.data.sources import where
from vlmtune.structures import IGNORE_INDEX, Conversation, ImageRef, ImageSize, Sample
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.progress import Progress

logger = logging.getLogger(__name__)

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Overlong: TypeAlias = Literal['drop', 'truncate_turns', 'split', 'error']
_MISSING = FileState(-1, -1)
_KNOWN_FILES = 65_536  # image files that a process remembers the sizes of


class _TooLong(DataError):
    """A sample does not fit ``max_length``."""


class RowPlanner:
    """Plans the rows of one data set. Called with a range of rows, it plans those; worker processes do that.

    Args:
        rows: the rows.
        processor: of the model to train.
        map_row: row -> Conversation.
        map_template: Conversation -> Sample.
        image_folder: root of the images.
        max_length: tokens of the longest sample.
        overlong: what becomes of longer ones, see SupervisedDataset.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        processor: Processor,
        map_row: Callable[..., Conversation],
        map_template: Callable[..., Sample],
        image_folder: Root,
        max_length: int,
        overlong: Overlong,
    ) -> None:
        self.rows = rows
        self.processor = processor
        self.map_row, self.map_template = map_row, map_template
        self.image_folder = image_folder
        self.max_length, self.overlong = max_length, overlong
        self._remember_files()

    def _remember_files(self) -> None:
        # Rows share files. Only for this planning: later the same path may be another picture.
        self._file = functools.lru_cache(maxsize=_KNOWN_FILES)(self._look_at_file)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_file'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember_files()

    @property
    def image_token(self) -> int | None:
        """The token that stands for image features; None for text models."""
        return self.processor.image_token_id if self.processor.family.has_vision else None

    def __call__(self, rows: range) -> pa.RecordBatch:
        """The records of a range of rows, see ``sample_table``."""
        return to_batch([self.plan(row) for row in rows], image_token=self.image_token)

    def images_of(self, row: int) -> tuple[ImageRef, ...]:
        """The images of a row."""
        return self.map_row(self.rows[row]).images

    def plan(self, row: int) -> PlannedRow:
        """What becomes of a row; a DataError makes it a bad one.

        Raises:
            UserError: a mistake that is not the row's.
        """
        images: tuple[ImageRef, ...] = ()
        try:
            whole: Conversation = self.map_row(self.rows[row])
            images = whole.images
            looks = [self._look(image) for image in images]
            sample, truncated = self._fit(whole, tuple(size for _, size in looks))
        except DataError as error:
            kind = OVERLONG if isinstance(error, _TooLong) else BAD
            files = tuple(self._state(image) for image in images)
            return PlannedRow(
                row, kind, None, False, images, files, where(self.rows, row), error.kind, str(error)
            )  # fmt: skip
        except Exception as error:
            error.add_note(f'while planning sample {row} ({where(self.rows, row)})')
            raise
        files = tuple(state for state, _ in looks)
        return PlannedRow(row, OK, _checked(sample, images), truncated, images, files)

    def _fit(self, whole: Conversation, sizes: tuple[ImageSize, ...]) -> tuple[Sample, bool]:
        """The sample of a conversation, and whether turns were taken from it."""
        sample: Sample = self.map_template(whole, processor=self.processor, image_sizes=sizes)
        if len(sample) <= self.max_length or (self.overlong == 'split' and can_be_cut(sample)):
            return sample, False
        shorter = _without_last_turn(whole) if self.overlong == 'truncate_turns' else None
        while shorter is not None and _may_learn(shorter):
            shown = sizes[: len(shorter.images)]
            shortened: Sample = self.map_template(shorter, processor=self.processor, image_sizes=shown)
            if len(shortened) <= self.max_length:
                return shortened, True
            shorter = _without_last_turn(shorter)
        raise _TooLong(f'has {len(sample)} tokens, max_length is {self.max_length}', kind='unfit_sample')

    # ---- image files

    def _look(self, image: ImageRef) -> tuple[FileState, ImageSize]:
        if image.path is None:
            return _MISSING, read_image_size(image)
        return self._file(image.path)

    def _look_at_file(self, path: str) -> tuple[FileState, ImageSize]:
        download(path, self.image_folder)
        state = file_state(path, self.image_folder)  # first: a change after this is seen later
        return state, read_image_size(ImageRef(path=path), root=self.image_folder)

    def _state(self, image: ImageRef) -> FileState:
        return _MISSING if image.path is None else file_state(image.path, self.image_folder)


def file_state(path: str, root: Root) -> FileState:
    """Size and time of change of an image file."""
    try:
        place, folder = locate(path, root)
        found = os.stat(place if folder is None else os.path.join(folder, place))
    except (OSError, ValueError, DataError):
        return _MISSING
    return FileState(found.st_size, found.st_mtime_ns)


def plan_rows(planner: RowPlanner, *, workers: int) -> Iterator[pa.RecordBatch]:
    """The records of all rows, in order; the log says how far it is.

    Raises:
        UserError: a mistake that is not a row's.
    """
    count = len(planner.rows)
    progress = Progress('rows planned', total=count)
    for batch in map_chunks(planner, count, workers=workers):
        yield batch
        progress.add(batch.num_rows)
    logger.info('planned %s rows in %.1f s', f'{count:,}', progress.seconds)


def _checked(sample: Sample, images: Sequence[ImageRef]) -> Sample:
    """The sample, if the table can hold it.

    Raises:
        ConfigError: the template function gave labels other than tokens, or other images than the row's first ones.
    """
    learned = sample.labels != IGNORE_INDEX
    if not np.array_equal(sample.labels[learned], sample.input_ids[learned]):
        raise ConfigError('template_map_fn: labels must be the tokens themselves, or IGNORE_INDEX; shift nothing')
    if len(sample.images) != len(sample.image_sizes) or sample.images != tuple(images[: len(sample.images)]):
        raise ConfigError('template_map_fn: the images of a sample must be the first ones of its conversation')
    return sample


def _may_learn(conversation: Conversation) -> bool:
    return any(message.role == 'assistant' and message.loss is not False for message in conversation.messages)


def _without_last_turn(conversation: Conversation) -> Conversation | None:
    """The conversation up to the answer before the last; None if there is none."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == 'assistant']
    if len(answers) < 2:
        return None
    messages = conversation.messages[: answers[-2] + 1]
    shown = sum(len(message.image_indices) for message in messages)
    return replace(conversation, messages=messages, images=conversation.images[:shown])
