"""Data that cannot be planned ahead: windows of rows are planned, packed and shuffled while the run goes on.

The parent process reads and plans; workers get the planned samples and decode their images. Two windows are in memory
at a time, whatever the size of the source.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.utils.data import Dataset

from vlmtune.data.augmentation import TransformSetting, build_augmentation
from vlmtune.data.bad_rows import BadSample, OnBadSample, note_bad_sample, over_budget, paths_of
from vlmtune.data.cut_samples import pieces
from vlmtune.data.downloads import image_root
from vlmtune.data.planning import Overlong, RowPlanner
from vlmtune.data.processor import Processor
from vlmtune.data.row_streams import RowStream, StreamedRows, StreamRow, open_stream
from vlmtune.data.sample_loading import blank_images, load_images, to_tensors
from vlmtune.data.sample_table import BAD, OK, PlannedRow
from vlmtune.data.workers import note_loading
from vlmtune.registry import DATASETS, build_callable
from vlmtune.structures import Conversation, Sample
from vlmtune.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class StreamSample(NamedTuple):
    """A planned sample and its place, for messages."""

    planned: Sample
    where: str
    row: int


class StreamKey(NamedTuple):
    """What a sampler of a stream asks for: not the number of a sample, which it has not, but the sample itself."""

    sample: StreamSample
    supervised: bool = True
    epoch: int = 0  # how often the source had been read through


class _Samples:
    """Stands where other data sets have their planned samples."""

    def __getitem__(self, sample: StreamSample) -> Sample:
        return sample.planned


@DATASETS.register_module()
class StreamingDataset(Dataset):
    """Image-text rows from a source that is read once through, again and again.

    It has no length and no epochs: a run over it needs ``max_steps``.

    Args:
        rows: ``dict(type=stream_rows, path=...)``, or anything that can be iterated over again and again.
        processor, dataset_map_fn, template_map_fn, image_folder, max_length, overlong: as of SupervisedDataset.
        on_bad_sample: 'error' stops at the first bad row, when it is reached; 'skip' leaves it out and logs it.
        bad_sample_budget: with 'skip', the share of the rows of a window that may be bad; above 0, one always may.
        shuffle_window: rows that are planned, packed and shuffled among themselves.
        bad_samples_file: a .jsonl file to write what could not be used to, when it is reached;
            ranks of one run may name the same file.
        image_transform, seed: as of SupervisedDataset; an epoch is once through the source.

    Raises:
        ConfigError: an unknown word for ``overlong`` or ``on_bad_sample``, a window of no rows, or a mistake in the
            settings of ``image_transform``.
        DataError: the image folder does not exist, or ``image_transform`` changes sizes.
    """

    samples = _Samples()

    def __init__(
        self,
        rows: RowStream | Iterable[Mapping[str, Any]] | Mapping[str, Any],
        *,
        processor: Processor,
        dataset_map_fn: Mapping[str, Any] | Callable[..., Conversation],
        template_map_fn: Mapping[str, Any] | Callable[..., Sample],
        image_folder: str | None = None,
        max_length: int = 2048,
        overlong: Overlong = 'drop',
        on_bad_sample: OnBadSample = 'error',
        bad_sample_budget: float = 0.01,
        shuffle_window: int = 2048,
        bad_samples_file: str | None = None,
        image_transform: TransformSetting | Sequence[TransformSetting] | None = None,
        seed: int = 0,
    ) -> None:
        for name, word, valid in (('overlong', overlong, Overlong), ('on_bad_sample', on_bad_sample, OnBadSample)):
            if word not in get_args(valid):
                raise ConfigError(f'{name}={word!r} is unknown; expected one of {", ".join(get_args(valid))}')
        if shuffle_window < 1:
            raise ConfigError(f'shuffle_window={shuffle_window}: expected a positive number of rows')
        self.augmentation = build_augmentation(image_transform, seed=seed)
        self.stream = open_stream(rows)
        self.processor, self.max_length, self.overlong = processor, max_length, overlong
        self.image_folder = image_root(image_folder)
        self.on_bad_sample, self.bad_sample_budget = on_bad_sample, bad_sample_budget
        self.shuffle_window = shuffle_window
        self.bad_samples_file = None if bad_samples_file is None else Path(bad_samples_file)
        if self.bad_samples_file is not None:
            self.bad_samples_file.parent.mkdir(parents=True, exist_ok=True)
            self.bad_samples_file.touch()  # a run that was resumed has its rows from before in it
        self._map_row, self._map_template = build_callable(dataset_map_fn), build_callable(template_map_fn)

    def plan(self, rows: Sequence[StreamRow], *, epoch: int = 0) -> list[StreamKey]:
        """The usable samples of a window of rows; no pixel is decoded.

        Args:
            rows: of the window.
            epoch: how often the source was read through before.

        Raises:
            DataError: a bad row, or too many of them; with overlong='error' one that is too long.
        """
        planner = RowPlanner(
            StreamedRows(rows, name=self.stream.name),
            processor=self.processor,
            map_row=self._map_row,
            map_template=self._map_template,
            image_folder=self.image_folder,
            max_length=self.max_length,
            overlong=self.overlong,
        )
        keys, bad, overlong = [], 0, 0
        for number, row in enumerate(rows):
            planned = planner.plan(number)
            if planned.kind == OK and planned.sample is not None:
                keys += [
                    StreamKey(StreamSample(sample, row.where, row.after[-1] - 1), epoch=epoch)
                    for sample in pieces(planned.sample, self.max_length)
                ]
            elif planned.kind == BAD:
                self._bad(row, planned)
                bad += 1
            elif self.overlong == 'error':
                raise DataError(f'{row.where}: {planned.reason}', kind='unfit_sample')
            else:
                self._note(row, planned, kind='overlong')
                overlong += 1
        if over_budget(bad, len(rows), self.bad_sample_budget):
            raise DataError(
                f'{bad} of the {len(rows)} rows up to {rows[-1].where} are bad, more than '
                f'bad_sample_budget={self.bad_sample_budget}; the log names them'
            )
        if overlong:
            logger.warning(
                '%d of the %d rows up to %s are longer than %d tokens and were dropped',
                overlong, len(rows), rows[-1].where, self.max_length,
            )  # fmt: skip
        return keys

    def _bad(self, row: StreamRow, planned: PlannedRow) -> None:
        if self.on_bad_sample == 'error':
            raise DataError(f'{row.where}: {planned.reason}')
        self._note(row, planned, kind='bad')
        logger.warning('skipped a bad row: %s: %s', row.where, planned.reason)

    def _note(self, row: StreamRow, planned: PlannedRow, *, kind: str) -> None:
        bad = BadSample(row.after[-1] - 1, row.where, planned.reason, kind, planned.error, paths_of(planned.images))
        note_bad_sample(bad, file=self.bad_samples_file)

    def where(self, sample: StreamSample) -> str:
        """The place of a sample for messages: ``train.jsonl:812``."""
        return sample.where

    def __getitem__(self, key: StreamKey) -> dict[str, torch.Tensor]:
        """Tensors of one sample, see ``to_tensors``.

        Raises:
            DataError: an image turned out to be broken when it was decoded, was changed since it was planned, or has
                another size after ``image_transform``.
        """
        note_loading(self, key)
        sample, supervised = key.sample.planned, key.supervised
        try:
            images = load_images(sample, root=self.image_folder)
        except DataError as error:
            if self.on_bad_sample == 'error':
                raise DataError(f'{key.sample.where}: {error}', kind=error.kind) from error
            place, paths = (key.sample.row, key.sample.where), paths_of(sample.images)
            note_bad_sample(BadSample(*place, str(error), 'undecodable', error.kind, paths), file=self.bad_samples_file)
            logger.warning('%s: %s; its images are blank and nothing of it is learned', key.sample.where, error)
            images, supervised = blank_images(sample), False
        else:
            if self.augmentation is not None:
                images = self.augmentation(images, epoch=key.epoch, sample=key.sample.row)
        inputs = self.processor.image_bytes(images)
        return to_tensors(sample, inputs, processor=self.processor, supervised=supervised)
