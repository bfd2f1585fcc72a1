"""Several data sets as one, by repeat counts or by weights."""

import bisect
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from vlmtune.config.targets import find_target
from vlmtune.data.augmentation import TransformSetting
from vlmtune.data.bad_rows import BadSample
from vlmtune.data.dataset import SupervisedDataset
from vlmtune.data.indexed import Indexed
from vlmtune.data.processor import Processor
from vlmtune.data.streaming import StreamingDataset
from vlmtune.registry import DATASETS
from vlmtune.structures import Sample, SampleKey
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar('T')


class _Joined(Indexed[T]):
    """Several sequences, one after the other; nothing is copied."""

    def __init__(self, parts: Iterable[Sequence[T]]) -> None:
        self.parts = list(parts)
        self.starts = [0, *accumulate(len(part) for part in self.parts)]  # and the end

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Which part, and where in it."""
        if not 0 <= index < len(self):
            raise IndexError(f'index {index}, but there are {len(self)}')
        part = bisect.bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def at(self, index: int) -> T:
        """One item of one part."""
        part, place = self.place(index)
        return self.parts[part][place]


@DATASETS.register_module()
class MixedDataset(Dataset):
    """Several data sets, each with its own rows, formats, loss rule and image folder, as one.

    Sample i of the mixture is a sample of one member; they are numbered one member after the other. How often each is
    seen in an epoch is said by ``repeats`` or by ``weights``; which ones are drawn for a part of a repeat is a function
    of (seed, epoch).

    Args:
        datasets: the members, as configs or built; all with one ``max_length``.
        processor: of the model to train; handed on to the members.
        repeats: for every member how often an epoch holds each of its samples; 2.5 means every sample twice and half
            of them, another half every epoch, once more. Neither this nor ``weights``: once.
        weights: instead, for every member its share of the samples of an epoch.
        samples_per_epoch: with weights; as many as the members have together where it is None.
        cache_dir, planning_workers, bad_samples_file: for members that do not say themselves, see SupervisedDataset;
            each member writes a file of its own, ``bad_samples_0.jsonl`` and so on.
        image_transform, seed: likewise. A sample that an epoch holds several times looks the same each time.

    Attributes:
        members, processor, max_length: as given.
        rows, samples: the rows and the planned samples of all members.
        counts: samples of every member in an epoch.

    Raises:
        ConfigError: the numbers do not fit the members, or the members one another.
        DataError: see SupervisedDataset.
    """

    def __init__(
        self,
        datasets: Sequence[Mapping[str, Any] | SupervisedDataset],
        *,
        processor: Processor,
        repeats: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        samples_per_epoch: int | None = None,
        cache_dir: str | None = None,
        planning_workers: int | None = None,
        bad_samples_file: str | None = None,
        image_transform: TransformSetting | Sequence[TransformSetting] | None = None,
        seed: int = 0,
    ) -> None:
        self._check(datasets, repeats=repeats, weights=weights, samples_per_epoch=samples_per_epoch)
        self.processor = processor
        given = dict(
            cache_dir=cache_dir, planning_workers=planning_workers, bad_samples_file=bad_samples_file,
            image_transform=image_transform, seed=seed,
        )  # fmt: skip
        self.members: list[SupervisedDataset] = [
            DATASETS.build(member, default_args=dict(processor=processor, **_options_of(number, given)))
            if isinstance(member, Mapping)
            else member
            for number, member in enumerate(datasets)
        ]
        limits = sorted({member.max_length for member in self.members})
        if len(limits) > 1:
            raise ConfigError(f'MixedDataset: its data sets have max_length {limits}; give all of them the same')
        self.max_length: int = limits[0]
        self.rows: _Joined[Mapping[str, Any]] = _Joined([member.rows for member in self.members])
        self.samples: _Joined[Sample] = _Joined([member.samples for member in self.members])
        self.counts = self._count(repeats=repeats, weights=weights, total=samples_per_epoch)

    @staticmethod
    def _check(
        datasets: Sequence[Mapping[str, Any] | SupervisedDataset],
        *,
        repeats: Sequence[float] | None,
        weights: Sequence[float] | None,
        samples_per_epoch: int | None,
    ) -> None:
        if not datasets:
            raise ConfigError('MixedDataset: datasets=[] is empty; give at least one')
        kinds = [find_target(d.get('type'), must_exist=False) if isinstance(d, Mapping) else type(d) for d in datasets]
        if StreamingDataset in kinds:
            raise ConfigError(
                f'MixedDataset: data set {kinds.index(StreamingDataset)} is a stream, whose samples cannot be counted; '
                'expected a SupervisedDataset'
            )
        if MixedDataset in kinds:
            raise ConfigError(
                f'MixedDataset: data set {kinds.index(MixedDataset)} is a MixedDataset itself; list its data '
                'sets here, each with its own repeats or weights'
            )
        members = len(datasets)
        if repeats is not None and weights is not None:
            raise ConfigError('MixedDataset: give repeats or weights, not both')
        if samples_per_epoch is not None and (weights is None or samples_per_epoch < 1):
            raise ConfigError(
                f'MixedDataset: samples_per_epoch={samples_per_epoch} must be positive and goes with weights'
            )
        for name, numbers in (('repeats', repeats), ('weights', weights)):
            if numbers is not None and (len(numbers) != members or not min(numbers) > 0):
                raise ConfigError(
                    f'MixedDataset: {name}={list(numbers)} for {members} data sets; expected a number above 0 for each'
                )

    def _count(
        self, *, repeats: Sequence[float] | None, weights: Sequence[float] | None, total: int | None
    ) -> list[int]:
        """Samples of every member in an epoch."""
        sizes = [len(member) for member in self.members]
        if weights is not None:
            shares = np.cumsum([0, *weights]) / sum(weights)
            counts = np.diff(np.rint(shares * (total or sum(sizes)))).astype(int).tolist()
        else:
            counts = [round(size * times) for size, times in zip(sizes, repeats or [1] * len(sizes), strict=True)]
        for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if not count:
                raise ConfigError(
                    f'MixedDataset: data set {number} ({size} samples) has no part in an epoch of {sum(counts)}; '
                    'raise its weight, its repeats or samples_per_epoch, or leave it out'
                )
            logger.info('data set %d: %d samples, %d in an epoch (each %.3g times)', number, size, count, count / size)
        return counts

    # ---- the members' attributes, joined

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[N]: tokens of every sample."""
        return np.concatenate([member.lengths for member in self.members])

    @functools.cached_property
    def supervised(self) -> np.ndarray:
        """int64[N]: learned tokens of every sample."""
        return np.concatenate([member.supervised for member in self.members])

    @functools.cached_property
    def patches(self) -> np.ndarray:
        """int64[N]: vision patches of every sample."""
        return np.concatenate([member.patches for member in self.members])

    @property
    def bad_samples(self) -> list[BadSample]:
        """What no member could use; ``index`` counts the rows of all members."""
        return self._joined_reports([member.bad_samples for member in self.members])

    @property
    def overlong_samples(self) -> list[BadSample]:
        """What was dropped because it is too long."""
        return self._joined_reports([member.overlong_samples for member in self.members])

    @property
    def truncated(self) -> int:
        """Samples that lost turns."""
        return sum(member.truncated for member in self.members)

    def _joined_reports(self, reports: list[list[BadSample]]) -> list[BadSample]:
        return [
            replace(bad, index=start + bad.index)
            for start, report in zip(self.rows.starts, reports, strict=False)
            for bad in report
        ]

    # ---- one sample

    def place(self, index: int) -> tuple[SupervisedDataset, int]:
        """The member that sample ``index`` belongs to, and its number there."""
        member, at = self.samples.place(index)
        return self.members[member], at

    def row_of(self, index: int) -> int:
        """The row of a sample, among the rows of all members."""
        member, at = self.samples.place(index)
        return self.rows.starts[member] + self.members[member].row_of(at)

    def where(self, index: int) -> str:
        """The place of a sample for messages: ``train.jsonl:812``."""
        member, at = self.place(index)
        return member.where(at)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> dict[str, torch.Tensor]:
        """Tensors of one sample, see SupervisedDataset."""
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        member, at = self.place(key.sample)
        return member[key._replace(sample=at)]

    def epoch_samples(self, *, seed: int, epoch: int) -> np.ndarray:
        """int64[M]: the samples of one epoch member after member, not shuffled."""
        chosen = []
        for number, (member, count) in enumerate(zip(self.members, self.counts, strict=True)):
            whole, part = divmod(count, len(member))
            rng = np.random.default_rng((seed, epoch, number))
            drawn = np.sort(rng.choice(len(member), part, replace=False))
            chosen.append(self.samples.starts[number] + np.concatenate([np.tile(np.arange(len(member)), whole), drawn]))
        return np.concatenate(chosen)


def _options_of(number: int, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, for one member: ``bad_samples.jsonl`` becomes ``bad_samples_0.jsonl``."""
    options = {name: value for name, value in given.items() if value is not None}
    if 'bad_samples_file' in options:
        path = Path(options['bad_samples_file'])
        options['bad_samples_file'] = str(path.with_stem(f'{path.stem}_{number}'))
    return options
