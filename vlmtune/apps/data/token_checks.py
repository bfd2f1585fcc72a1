"""What samples cost: tokens, packs and steps, now and with other limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mmengine.config import Config

from vlmtune.apps.data.alternatives import Alternatives, Room, Shape, image_limits, max_lengths
from vlmtune.apps.data.crops import Crops, find_crops
from vlmtune.apps.data.data_problems import ERROR_KINDS, DataSetReport, Problem
from vlmtune.apps.data.train_data import DataPart, build_loader, members_of
from vlmtune.data import MixedDataset, Processor, SupervisedDataset
from vlmtune.data.images import read_image_size
from vlmtune.engine.worst_pack import is_packed, summarise_plan

SAMPLED = 2000
"""Samples from which the cost of other limits is estimated; up to so many, it is exact."""
_BARS = 10


@dataclass(frozen=True)
class Bar:
    """Samples of ``first`` to ``last`` tokens."""

    first: int
    last: int
    samples: int


@dataclass(frozen=True)
class TokenReport:
    """One epoch of a data set, as the recipe packs it.

    Attributes:
        samples, tokens, supervised: how many; a sample that is repeated counts every time.
        image_tokens: an estimate where there are more than ``SAMPLED`` samples.
        truncated: samples that were shortened by whole turns to fit.
        packed: whether packs are made, or padded batches.
        packs: packs or batches.
        density: share of the tokens in them that are of samples, not padding or left free.
        steps: optimizer steps of one process.
        crops: what the image processor cuts away; as ``image_tokens`` an estimate.
    """

    samples: int
    tokens: int
    supervised: int
    image_tokens: int
    truncated: int
    longest: int
    histogram: list[Bar]
    packed: bool
    packs: int
    density: float
    steps: int
    crops: Crops | None
    alternatives: list[Alternatives]


def add_token_problems(
    parts: Sequence[DataPart], members: Sequence[SupervisedDataset], reports: Sequence[DataSetReport]
) -> None:
    """Add to each report what planning found wrong, unless it is known from the files."""
    for part, member, report in zip(parts, members, reports, strict=True):
        known = {problem.index for problem in report.problems if problem.kind in ERROR_KINDS}
        for bad in member.bad_samples:
            if bad.index not in known:
                report.problems.append(Problem(bad.index, bad.where, _kind(bad.error), bad.reason))
        kind = 'overlong_refused' if part.overlong == 'error' else 'overlong'
        report.problems += [Problem(s.index, s.where, kind, s.reason) for s in member.overlong_samples]
        for sample in np.flatnonzero(member.supervised == 0).tolist():
            reason = 'no token of it is learned; fix the row, the loss rule, or overlong'
            report.problems.append(Problem(member.row_of(sample), member.where(sample), 'nothing_learned', reason))


def _kind(kind: str) -> str:
    """What the files do not show comes from the model: its template, or its limits."""
    return kind if kind in ERROR_KINDS and kind != 'wrong_row' else 'unfit_sample'


def measure_tokens(
    cfg: Config, parts: Sequence[DataPart], dataset: SupervisedDataset | MixedDataset, *, processor: Processor
) -> TokenReport:
    """Measure one epoch.

    Raises:
        UserError: the samples do not make one optimizer step, or the loader's settings are wrong.
    """
    loader = build_loader(cfg, dataset)
    plan, packed = summarise_plan(loader, steps=len(loader)), is_packed(loader)
    epoch = dataset.epoch_samples(seed=cfg.randomness.seed, epoch=0)
    lengths = dataset.lengths[epoch]
    shapes = sample_shapes(parts, dataset, epoch=epoch, processor=processor)
    room = Room(
        dataset.max_length,
        max_patches=cfg.train_dataloader.get('max_patches'),
        batch_size=None if packed else cfg.train_dataloader.get('batch_size', 1),
    )
    return TokenReport(
        samples=len(epoch),
        tokens=int(lengths.sum()),
        supervised=int(dataset.supervised[epoch].sum()),
        image_tokens=round(sum(shape.image_tokens * shape.weight for shape in shapes if shape.planned)),
        truncated=sum(member.truncated for member in members_of(dataset)),
        longest=int(lengths.max()),
        histogram=_histogram(lengths),
        packed=packed,
        packs=plan.packs,
        density=plan.density,
        steps=plan.first_steps,
        crops=find_crops(processor, [size for shape in shapes if shape.planned for size in shape.sizes]),
        alternatives=[
            max_lengths(shapes, room=room),
            *image_limits(shapes, processor=processor, room=room),
        ],
    )


def _histogram(lengths: np.ndarray) -> list[Bar]:
    width = -(-int(lengths.max()) // _BARS)
    counts = np.bincount((lengths - 1) // width, minlength=1)
    longest = int(lengths.max())
    return [Bar(i * width + 1, min((i + 1) * width, longest), int(count)) for i, count in enumerate(counts)]


def sample_shapes(
    parts: Sequence[DataPart], dataset: SupervisedDataset | MixedDataset, *, epoch: np.ndarray, processor: Processor
) -> list[Shape]:
    """Up to ``SAMPLED`` samples of an epoch, and up to as many that were too long for it.

    Args:
        parts: the data sets, in the order of the members.
        dataset: planned.
        epoch: int64[M], the samples of an epoch.
        processor: of the model.
    """
    rng = np.random.default_rng(0)
    drawn = rng.choice(epoch, min(SAMPLED, len(epoch)), replace=False)
    image = processor.image_token_id if processor.family.has_vision else None
    shapes = [
        Shape.of(dataset.samples[index], image_token=image, weight=len(epoch) / len(drawn), planned=True)
        for index in np.sort(drawn).tolist()
    ]
    start = 0
    for part, member in zip(parts, members_of(dataset), strict=True):
        repeats = np.count_nonzero((epoch >= start) & (epoch < start + len(member))) / len(member)
        start += len(member)
        rows = np.array([sample.index for sample in member.overlong_samples], dtype=np.int64)
        chosen = rng.choice(rows, min(SAMPLED, len(rows)), replace=False)
        for row in np.sort(chosen).tolist():
            conversation = part.map_row(part.rows[row])
            sizes = [read_image_size(ref, root=part.image_folder) for ref in conversation.images]
            sample = part.map_template(conversation, processor=processor, image_sizes=sizes)
            weight = repeats * len(rows) / len(chosen)
            shapes.append(Shape.of(sample, image_token=image, weight=weight, planned=False))
    return shapes
