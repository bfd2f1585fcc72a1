"""The training data loader: a plan of packs, a sampler over it, a collator."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.data.collate import Collator
from vlmtune.data.dataset import SupervisedDataset
from vlmtune.data.filler import image_filler
from vlmtune.data.mixture import MixedDataset
from vlmtune.data.packing import Plan, check_patches, plan_batches, plan_packs
from vlmtune.data.samplers import PackSampler, Tail
from vlmtune.data.stream_sampler import StreamSampler
from vlmtune.data.streaming import StreamingDataset
from vlmtune.data.workers import DEFAULT_TIMEOUT, WorkerBatches, begin_work, check_temporary_folder, make_board
from vlmtune.utils.errors import ConfigError

PlannedData: TypeAlias = SupervisedDataset | MixedDataset


class StepDataLoader(DataLoader):
    """A loader whose length counts optimizer steps, so that mmengine's epoch arithmetic is right.

    Args:
        seed: the seeds of the workers are a function of it and the epoch, also after a resume.
        timeout: seconds that workers may take for a batch, 0 for no limit; None is ``DEFAULT_TIMEOUT``. Without workers
            nobody could tell.
        options: as in torch; ``batch_sampler`` is a PackSampler, the generator is the loader's own.
    """

    def __init__(self, dataset: Dataset, *, seed: int, timeout: float | None = None, **options: Any) -> None:
        generator = torch.Generator()  # its own: the global one must not move
        workers: dict[str, Any] = {}
        board = make_board(options.get('num_workers', 0))
        if options.get('num_workers'):
            check_temporary_folder()
            seconds = DEFAULT_TIMEOUT if timeout is None else timeout
            workers = dict(timeout=seconds, worker_init_fn=partial(begin_work, board=board))
        super().__init__(dataset, generator=generator, **{**workers, **options})
        self.seed, self._board = seed, board

    def __iter__(self) -> Any:
        words = np.random.SeedSequence((self.seed, self.batch_sampler.epoch)).generate_state(1)  # type: ignore[union-attr]
        self.generator.manual_seed(int(words[0]))
        start = super().__iter__
        return WorkerBatches(start, board=self._board) if self.num_workers else start()

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]


def build_train_loader(
    dataset: PlannedData | StreamingDataset,
    *,
    seed: int,
    accumulative_counts: int = 1,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1,
    num_workers: int = 0,
    pack_to_max_length: bool = False,
    max_patches: int | None = None,
    shuffle: bool = True,
    group_by_length: bool = False,
    tail: Tail = 'fill',
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    timeout: float | None = None,
    images_in_every_batch: bool = False,
) -> StepDataLoader:
    """A loader of micro-batches for one rank.

    Args:
        dataset: already planned.
        seed: the plan of an epoch is a function of it.
        accumulative_counts, rank, world_size: how packs are dealt out.
        batch_size: samples per micro-batch without packing; 1 with it.
        num_workers: processes that decode images.
        pack_to_max_length: join samples to rows of up to ``dataset.max_length`` tokens; they do not see each other.
        max_patches: with packing, vision patches (before merging) per row, which bounds the memory that the vision
            encoder takes; None sets no limit.
        shuffle: a new order every epoch (without packing; packs are always shuffled).
        group_by_length: without packing, put samples of like length together.
        tail: 'fill' or 'drop', see PackSampler.
        pin_memory: as in torch.
        prefetch_factor: batches that each worker holds ready; only with workers.
        timeout: seconds that workers may take for a batch before the run stops, see StepDataLoader; 0 for no limit.
        images_in_every_batch: a batch without images gets a blank one that weighs nothing; for ranks that have to
            compute every layer together.

    Raises:
        ConfigError: settings that contradict each other or are out of range; the family cannot be packed.
        DataError: the data does not make one optimizer step; a sample has more patches than a row may have.
    """
    _check_settings(
        batch_size=batch_size, accumulative_counts=accumulative_counts, pack=pack_to_max_length,
        max_patches=max_patches, tail=tail, num_workers=num_workers, prefetch_factor=prefetch_factor,
        timeout=timeout,
    )  # fmt: skip
    processor = dataset.processor
    filler = image_filler(processor) if images_in_every_batch and processor.family.has_vision else None
    pad_token_id = processor.tokenizer.pad_token_id
    collate = Collator(processor.family, pad_token_id=pad_token_id, pack=pack_to_max_length, filler=filler)
    rows: Callable[..., Plan] = (
        partial(plan_packs, max_length=dataset.max_length, max_patches=max_patches, seed=seed)
        if pack_to_max_length
        else partial(_batches, batch_size=batch_size, seed=seed, shuffle=shuffle, group_by_length=group_by_length)
    )
    share = dict(accumulative_counts=accumulative_counts, rank=rank, world_size=world_size)
    sampler = _make_sampler(dataset, rows, seed=seed, max_patches=max_patches, tail=tail, share=share)
    workers: dict[str, Any] = dict(num_workers=num_workers, pin_memory=pin_memory, prefetch_factor=prefetch_factor)
    return StepDataLoader(dataset, seed=seed, timeout=timeout, batch_sampler=sampler, collate_fn=collate, **workers)


def _make_sampler(
    dataset: PlannedData | StreamingDataset,
    rows: Callable[..., Plan],
    *,
    seed: int,
    max_patches: int | None,
    tail: Tail,
    share: Mapping[str, int],
) -> PackSampler | StreamSampler:
    if isinstance(dataset, StreamingDataset):
        return StreamSampler(dataset, rows, max_patches=max_patches, **share)
    check_patches(
        dataset.patches, max_patches=max_patches, name=lambda index: f'sample {index} ({dataset.where(index)})'
    )
    return PackSampler(partial(_epoch, dataset, rows, seed=seed), tail=tail, **share)


def _check_settings(
    *,
    batch_size: int,
    accumulative_counts: int,
    pack: bool,
    max_patches: int | None,
    tail: str,
    num_workers: int,
    prefetch_factor: int | None,
    timeout: float | None,
) -> None:
    if pack and batch_size != 1:
        raise ConfigError(
            f'batch_size={batch_size} with pack_to_max_length: a pack is one row; '
            'set batch_size=1 and raise max_length or accumulative_counts instead'
        )
    if max_patches is not None and not pack:
        raise ConfigError(
            f'max_patches={max_patches} is a limit of packs; set pack_to_max_length=True, or lower batch_size'
        )
    if max_patches is not None and max_patches < 1:
        raise ConfigError(f'max_patches={max_patches}: expected a positive integer, or None for no limit')
    if tail not in get_args(Tail):
        raise ConfigError(f'tail={tail!r} is unknown; expected one of {", ".join(get_args(Tail))}')
    if batch_size < 1 or accumulative_counts < 1:
        raise ConfigError(f'batch_size={batch_size} and accumulative_counts={accumulative_counts} must be at least 1')
    if num_workers < 0:
        raise ConfigError(f'num_workers={num_workers}: expected a number of processes, or 0 for none')
    if num_workers == 0 and prefetch_factor is not None:
        raise ConfigError(f'prefetch_factor={prefetch_factor} needs num_workers of at least 1')
    if timeout is not None and not 0 <= timeout < float('inf'):
        raise ConfigError(f'timeout={timeout}: expected seconds, or 0 for no limit')


def _epoch(dataset: PlannedData, rows: Callable[..., Plan], *, seed: int, epoch: int) -> Plan:
    indices = dataset.epoch_samples(seed=seed, epoch=epoch)
    return rows(dataset.lengths, patches=dataset.patches, indices=indices, epoch=epoch)


def _batches(lengths: np.ndarray, *, patches: np.ndarray, **options: Any) -> Plan:
    return plan_batches(lengths, **options)
