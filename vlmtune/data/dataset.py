"""Rows -> samples, all of them before the first step and without decoding a pixel."""

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from vlmtune.data.augmentation import TransformSetting, build_augmentation
from vlmtune.data.bad_rows import BadSample, OnBadSample, note_bad_sample, over_budget, paths_of
from vlmtune.data.cut_samples import CutSamples
from vlmtune.data.downloads import image_root
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.plan_cache import open_plan
from vlmtune.data.planning import Overlong, RowPlanner, Rows
from vlmtune.data.processor import Processor
from vlmtune.data.sample_loading import blank_images, load_images, to_tensors
from vlmtune.data.sample_table import BAD, OVERLONG, SampleTable, problem_of
from vlmtune.data.sources import where
from vlmtune.data.workers import note_loading
from vlmtune.registry import DATASETS, build_callable
from vlmtune.structures import Conversation, Sample, SampleKey
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.json_lines import as_line

logger = logging.getLogger(__name__)


@DATASETS.register_module()
class SupervisedDataset(Dataset):
    """Image-text rows, tokenised at construction; pixels are decoded when a sample is fetched.

    Args:
        rows: the rows, or ``dict(type=load_rows, path=...)``.
        processor: of the model to train.
        dataset_map_fn: row -> Conversation.
        template_map_fn: Conversation -> Sample.
        image_folder: root of relative image paths; images outside of it are refused.
        url_hosts: hosts whose images are downloaded while planning, to a folder beside ``cache_dir``, which must be
            set; other URLs are refused.
        max_length: tokens of the longest sample, image tokens included.
        overlong: what becomes of longer samples: 'drop', 'truncate_turns' (last turns go first, an image is never
            cut), 'split' (plain text, of which every token is learned, makes several samples; others are dropped), or
            'error'.
        on_bad_sample: 'error' stops at the first bad row, 'skip' leaves it out and counts it. An image that turns out
            to be broken only when it is decoded stops the run, or with 'skip' takes part blank and unlearned.
        bad_sample_budget: with 'skip', the share of rows that may be bad; above 0, one always may.
        cache_dir: where the plan is kept for the next run and for other ranks; None plans every time.
        planning_workers: processes that plan; None takes one per core for many rows, 0 plans in this process.
        bad_samples_file: a .jsonl file to write what could not be used to, one row a line; ranks of one run may
            name the same file.
        image_transform: changes images while training, see ``data/augmentation.py``: called as
            ``transform(image, rng)`` on every decoded image; ``dict(type=color_jitter, ...)``, or several in a list.
        seed: of the run; what ``image_transform`` draws is a function of it, the epoch, the sample and the image.

    Attributes:
        rows, processor, max_length, overlong, on_bad_sample: as given.
        image_folder: as given; with ``url_hosts`` an ImageRoot.
        samples: the planned samples, read from a file mapped into memory.
        features: a frozen vision encoder's features of the images; where it is set, they take the place of pixels.

    Raises:
        ConfigError: an unknown word for ``overlong`` or ``on_bad_sample``, or a mistake in the settings of the model or
            of ``image_transform``.
        DataError: a bad row, too many bad rows, no usable row, or an ``image_transform`` that changes sizes.
    """

    def __init__(
        self,
        rows: Rows | Mapping[str, Any],
        *,
        processor: Processor,
        dataset_map_fn: Mapping[str, Any] | Callable[..., Conversation],
        template_map_fn: Mapping[str, Any] | Callable[..., Sample],
        image_folder: str | None = None,
        url_hosts: Sequence[str] = (),
        max_length: int = 2048,
        overlong: Overlong = 'drop',
        on_bad_sample: OnBadSample = 'error',
        bad_sample_budget: float = 0.01,
        cache_dir: str | None = None,
        planning_workers: int | None = None,
        bad_samples_file: str | None = None,
        image_transform: TransformSetting | Sequence[TransformSetting] | None = None,
        seed: int = 0,
    ) -> None:
        for name, word, valid in (('overlong', overlong, Overlong), ('on_bad_sample', on_bad_sample, OnBadSample)):
            if word not in get_args(valid):
                raise ConfigError(f'{name}={word!r} is unknown; expected one of {", ".join(get_args(valid))}')
        self.augmentation = build_augmentation(image_transform, seed=seed)
        self.rows: Rows = build_callable(rows)() if isinstance(rows, Mapping) else rows
        self.processor = processor
        self.image_folder = image_root(image_folder, url_hosts=url_hosts, cache_dir=cache_dir)
        self.max_length = max_length
        self.overlong, self.on_bad_sample = overlong, on_bad_sample
        self.bad_samples_file = None if bad_samples_file is None else Path(bad_samples_file)
        planner = RowPlanner(
            self.rows,
            processor=processor,
            map_row=build_callable(dataset_map_fn),
            map_template=build_callable(template_map_fn),
            image_folder=self.image_folder,
            max_length=max_length,
            overlong=overlong,
        )
        table = open_plan(planner, cache_dir=cache_dir, workers=planning_workers, inspect=self._stop_at_problems)
        self.samples: SampleTable | CutSamples = (
            CutSamples(table, max_length=max_length) if overlong == 'split' else table
        )
        self.features: FeatureStore | None = None
        self._report(bad_sample_budget)

    # ---- what could not be used

    @functools.cached_property
    def bad_samples(self) -> list[BadSample]:
        """Rows that are broken, in order; kind 'bad'."""
        return self.samples.problems(BAD)

    @functools.cached_property
    def overlong_samples(self) -> list[BadSample]:
        """Rows that were dropped because they are too long, in order; kind 'overlong'."""
        return self.samples.problems(OVERLONG)

    @property
    def truncated(self) -> int:
        """Samples that lost turns because they were too long."""
        return int(self.samples.numbers('truncated').sum())

    def _is_error(self, kind: int) -> bool:
        return (self.on_bad_sample if kind == BAD else self.overlong) == 'error' and kind in (BAD, OVERLONG)

    def _stop_at_problems(self, batch: pa.RecordBatch) -> None:
        for at, kind in enumerate(batch.column('kind').to_pylist()):
            if self._is_error(kind):
                raise _named(problem_of(batch, at))

    def _report(self, budget: float) -> None:
        problems = sorted([*self.bad_samples, *self.overlong_samples], key=lambda problem: problem.index)
        if self.bad_samples_file is not None:
            self.bad_samples_file.parent.mkdir(parents=True, exist_ok=True)
            _write_anew(self.bad_samples_file, ''.join(as_line(asdict(problem)) for problem in problems))
        for problem in problems:  # of a plan that was made with other settings of what is an error
            if self._is_error(BAD if problem.kind == 'bad' else OVERLONG):
                raise _named(problem)
        bad, count = self.bad_samples, self.samples.row_count
        if dropped := len(self.overlong_samples):
            logger.warning(
                '%d of %d samples are longer than %d tokens and were dropped', dropped, count, self.max_length
            )
        if self.truncated:
            logger.warning('%d of %d samples lost turns to fit %d tokens', self.truncated, count, self.max_length)
        if bad:
            logger.warning(
                '%d of %d samples are bad and were skipped; the first is %s: %s',
                len(bad), count, bad[0].where, bad[0].reason,
            )  # fmt: skip
        if over_budget(len(bad), count, budget):
            raise DataError(
                f'{len(bad)} of {count} samples are bad, more than bad_sample_budget={budget}; '
                f'the first is sample {bad[0].index} ({bad[0].where}): {bad[0].reason}'
            )
        if not len(self.samples):
            raise DataError(f'none of {count} rows can be used ({dropped} are longer than {self.max_length} tokens)')

    # ---- what is known before anything is fetched

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[N]: tokens of every sample."""
        return self.samples.numbers('length')

    @functools.cached_property
    def supervised(self) -> np.ndarray:
        """int64[N]: learned tokens of every sample, without the first position, which nothing predicts."""
        return self.samples.numbers('supervised')

    @functools.cached_property
    def patches(self) -> np.ndarray:
        """int64[N]: vision patches of every sample."""
        return self.samples.numbers('patches')

    def row_of(self, index: int) -> int:
        """The row that a sample was made of."""
        return int(self.samples.rows[index])

    def where(self, index: int) -> str:
        """The place of a sample for messages: ``train.jsonl:812``."""
        return where(self.rows, self.row_of(index))

    def epoch_samples(self, *, seed: int, epoch: int) -> np.ndarray:
        """int64[M]: the samples of one epoch, not shuffled; here each once, whatever seed and epoch are."""
        return np.arange(len(self))

    # ---- fetching

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> dict[str, torch.Tensor]:
        """Tensors of one sample.

        Returns:
            input_ids long[L], labels long[L], position_ids long[L] or long[4, L], and the family's image inputs
            as ``Processor.image_bytes`` gives them.

        Raises:
            DataError: an image turned out to be broken when it was decoded, was changed since it was planned, or has
                another size after ``image_transform``.
        """
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        note_loading(self, key)
        sample, supervised = self.samples[key.sample], key.supervised
        inputs, error = self._image_inputs(sample, key)
        if error is not None:
            row = self.row_of(key.sample)
            bad = BadSample(row, where(self.rows, row), str(error), 'undecodable', error.kind, paths_of(sample.images))
            named = _named(bad)
            if self.on_bad_sample == 'error':
                raise named from error
            note_bad_sample(bad, file=self.bad_samples_file)
            logger.warning('%s; its images are blank and nothing of it is learned', named)
            supervised = False
        return to_tensors(sample, inputs, processor=self.processor, supervised=supervised)

    def _image_inputs(self, sample: Sample, key: SampleKey) -> tuple[dict[str, torch.Tensor], DataError | None]:
        """The tensors of a sample's images; where one cannot be decoded, those of blank images and the reason."""
        if self.features is not None and sample.images:
            features, reason = self.features.read(sample.images)
            return dict(image_features=features), None if reason is None else DataError(reason, kind='broken_image')
        try:
            images = load_images(sample, root=self.image_folder)
        except DataError as error:
            return self.processor.image_bytes(blank_images(sample)), error
        if self.augmentation is not None:
            images = self.augmentation(images, epoch=key.epoch, sample=key.sample)
        return self.processor.image_bytes(images), None


def _write_anew(file: Path, text: str) -> None:
    """Replace a file at once: other ranks write the same text, and then add to it."""
    handle, new = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    with os.fdopen(handle, 'w', encoding='utf-8') as out:
        out.write(text)
    os.chmod(new, 0o644)
    os.replace(new, file)


def _named(problem: BadSample) -> DataError:
    return DataError(f'sample {problem.index} ({problem.where}): {problem.reason}', kind=problem.error)
