"""Rows -> samples, all of them before the first step and without decoding a pixel."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vlmtune.data.images import load_image, read_image_size
from vlmtune.data.processor import Processor
from vlmtune.data.sources import where
from vlmtune.ops import mrope_positions
from vlmtune.registry import DATASETS, build_callable
from vlmtune.structures import IGNORE_INDEX, Conversation, Sample, SampleKey
from vlmtune.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Overlong: TypeAlias = Literal['drop', 'truncate_turns', 'error']
OnBadSample: TypeAlias = Literal['error', 'skip']


@dataclass(frozen=True)
class BadSample:
    """A row that could not be used."""

    index: int
    where: str
    reason: str


class _TooLong(DataError):
    """A sample does not fit ``max_length``."""


@DATASETS.register_module()
class SupervisedDataset(Dataset):
    """Image-text rows, tokenised at construction; pixels are decoded when a sample is fetched.

    Args:
        rows: the rows, or ``dict(type=load_rows, path=...)``.
        processor: of the model to train.
        dataset_map_fn: row -> Conversation.
        template_map_fn: Conversation -> Sample.
        image_folder: root of relative image paths; images outside of it are refused.
        max_length: tokens of the longest sample, image tokens included.
        overlong: what becomes of longer samples: 'drop', 'truncate_turns' (last turns go first, an image is never
            cut), or 'error'.
        on_bad_sample: 'error' stops at the first bad row, 'skip' leaves it out and counts it. An image that turns out
            to be broken only when it is decoded stops the run, or with 'skip' takes part blank and unlearned.
        bad_sample_budget: with 'skip', the share of rows that may be bad.

    Raises:
        ConfigError: an unknown word for ``overlong`` or ``on_bad_sample``.
        DataError: a bad row, too many bad rows, or no usable row.
    """

    def __init__(
        self,
        rows: Rows | Mapping[str, Any],
        *,
        processor: Processor,
        dataset_map_fn: Mapping[str, Any] | Callable[..., Conversation],
        template_map_fn: Mapping[str, Any] | Callable[..., Sample],
        image_folder: str | None = None,
        max_length: int = 2048,
        overlong: Overlong = 'drop',
        on_bad_sample: OnBadSample = 'error',
        bad_sample_budget: float = 0.01,
    ) -> None:
        for name, word, valid in (('overlong', overlong, Overlong), ('on_bad_sample', on_bad_sample, OnBadSample)):
            if word not in get_args(valid):
                raise ConfigError(f'{name}={word!r} is unknown; expected one of {", ".join(get_args(valid))}')
        self.rows: Rows = build_callable(rows)() if isinstance(rows, Mapping) else rows
        self.processor = processor
        self.image_folder = None if image_folder is None else Path(image_folder).expanduser()
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise DataError(f'image_folder {self.image_folder.absolute()} does not exist')
        self.max_length = max_length
        self.overlong, self.on_bad_sample = overlong, on_bad_sample
        self._map_row = build_callable(dataset_map_fn)
        self._map_template = build_callable(template_map_fn)
        self.bad_samples: list[BadSample] = []
        self.dropped = 0
        self._row_of: list[int] = []  # of every sample
        self.samples = self._plan_all(bad_sample_budget)

    # ---- planning

    def _plan_all(self, budget: float) -> list[Sample]:
        samples = []
        for index in range(len(self.rows)):
            try:
                samples.append(self._plan(index))
                self._row_of.append(index)
            except _TooLong as error:
                if self.overlong == 'error':
                    raise self._named(index, error) from error
                self.dropped += 1
            except DataError as error:
                if self.on_bad_sample == 'error':
                    raise self._named(index, error) from error
                self.bad_samples.append(BadSample(index, where(self.rows, index), str(error)))
        self._report(samples, budget)
        return samples

    def _named(self, index: int, error: DataError) -> DataError:
        return DataError(f'sample {index} ({where(self.rows, index)}): {error}')

    def _plan(self, index: int) -> Sample:
        whole: Conversation = self._map_row(self.rows[index])
        sizes = tuple(read_image_size(image, root=self.image_folder) for image in whole.images)
        sample: Sample = self._map_template(whole, processor=self.processor, image_sizes=sizes)
        if len(sample) <= self.max_length:
            return sample
        shorter = _without_last_turn(whole) if self.overlong == 'truncate_turns' else None
        while shorter is not None and _may_learn(shorter):
            shown = sizes[: len(shorter.images)]
            shortened: Sample = self._map_template(shorter, processor=self.processor, image_sizes=shown)
            if len(shortened) <= self.max_length:
                return shortened
            shorter = _without_last_turn(shorter)
        raise _TooLong(f'has {len(sample)} tokens, max_length is {self.max_length}')

    def _report(self, samples: list[Sample], budget: float) -> None:
        if self.dropped:
            logger.warning(
                '%d of %d samples are longer than %d tokens and were dropped',
                self.dropped,
                len(self.rows),
                self.max_length,
            )
        if self.bad_samples:
            first = self.bad_samples[0]
            logger.warning(
                '%d of %d samples are bad and were skipped; the first: %s', len(self.bad_samples), len(self.rows), first
            )
        if len(self.bad_samples) > budget * len(self.rows):
            first = self.bad_samples[0]
            raise DataError(
                f'{len(self.bad_samples)} of {len(self.rows)} samples are bad, more than bad_sample_budget={budget}; '
                f'the first is sample {first.index} ({first.where}): {first.reason}'
            )
        if not samples:
            raise DataError(
                f'none of {len(self.rows)} rows can be used ({self.dropped} are longer than {self.max_length} tokens)'
            )

    # ---- fetching

    @property
    def lengths(self) -> np.ndarray:
        """int64[N]: tokens of every sample."""
        return np.array([len(sample) for sample in self.samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> dict[str, torch.Tensor]:
        """Tensors of one sample.

        Returns:
            input_ids long[L], labels long[L], position_ids long[L] or long[4, L], and the family's image inputs.

        Raises:
            DataError: an image turned out to be broken when it was decoded, or was changed since it was planned.
        """
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        sample, supervised = self.samples[key.sample], key.supervised
        try:
            images = self._load_images(sample)
        except DataError as error:
            named = self._named(self._row_of[key.sample], error)
            if self.on_bad_sample == 'error':
                raise named from error
            logger.warning('%s; its images are blank and nothing of it is learned', named)
            images, supervised = [Image.new('RGB', (w, h)) for h, w in sample.image_sizes], False
        inputs = self.processor.image_inputs(images)
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))
        labels = torch.from_numpy(sample.labels.astype(np.int64))
        if not supervised:
            labels = torch.full_like(labels, IGNORE_INDEX)
        return dict(input_ids=ids, labels=labels, position_ids=self._positions(ids, inputs), **inputs)

    def _load_images(self, sample: Sample) -> list[Image.Image]:
        images = [load_image(image, root=self.image_folder) for image in sample.images]
        for ref, image, planned in zip(sample.images, images, sample.image_sizes, strict=True):
            if (image.height, image.width) != planned:
                raise DataError(
                    f'image {ref} has {image.width} x {image.height} pixels, but had {planned.width} x '
                    f'{planned.height} when the run started; leave the images alone while training'
                )
        return images

    def _positions(self, ids: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        text = torch.arange(len(ids))
        if self.processor.family.positions == 'rope':
            return text
        grid = inputs.get('image_grid_thw', torch.empty(0, 3, dtype=torch.long))
        axes = mrope_positions(
            ids,
            image_token_id=self.processor.image_token_id,
            image_grid_thw=grid,
            merge_size=self.processor.image_processor.merge_size,
        )
        return torch.cat([text[None], axes])  # transformers reads the sample borders from the first axis


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
