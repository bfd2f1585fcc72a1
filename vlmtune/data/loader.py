"""The training data loader: a plan of packs, a sampler over it, a collator."""

from functools import partial
from typing import get_args

import torch
from torch.utils.data import DataLoader

from vlmtune.data.collate import Collator
from vlmtune.data.dataset import SupervisedDataset
from vlmtune.data.packing import plan_batches, plan_packs
from vlmtune.data.samplers import PackSampler, Tail
from vlmtune.utils.errors import ConfigError


class StepDataLoader(DataLoader):
    """A loader whose length counts optimizer steps, so that mmengine's epoch arithmetic is right."""

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]


def build_train_loader(
    dataset: SupervisedDataset,
    *,
    seed: int,
    accumulative_counts: int = 1,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1,
    num_workers: int = 0,
    pack_to_max_length: bool = False,
    shuffle: bool = True,
    group_by_length: bool = False,
    tail: Tail = 'fill',
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
) -> StepDataLoader:
    """A loader of micro-batches for one rank.

    Args:
        dataset: already planned.
        seed: the plan of an epoch is a function of it.
        accumulative_counts, rank, world_size: how packs are dealt out.
        batch_size: samples per micro-batch without packing; 1 with it.
        num_workers: processes that decode images.
        pack_to_max_length: join samples to rows of up to ``dataset.max_length`` tokens; they do not see each other.
        shuffle: a new order every epoch (without packing; packs are always shuffled).
        group_by_length: without packing, put samples of like length together.
        tail: 'fill' or 'drop', see PackSampler.
        pin_memory: as in torch.
        prefetch_factor: batches that each worker holds ready; only with workers.

    Raises:
        ConfigError: batch_size is not 1 with packing, or is not positive; an unknown tail; a prefetch_factor without
            workers; the family cannot be packed.
        DataError: the data does not make one optimizer step.
    """
    if pack_to_max_length and batch_size != 1:
        raise ConfigError(
            f'batch_size={batch_size} with pack_to_max_length: a pack is one row; '
            'set batch_size=1 and raise max_length or accumulative_counts instead'
        )
    if tail not in get_args(Tail):
        raise ConfigError(f'tail={tail!r} is unknown; expected one of {", ".join(get_args(Tail))}')
    if batch_size < 1 or accumulative_counts < 1:
        raise ConfigError(f'batch_size={batch_size} and accumulative_counts={accumulative_counts} must be at least 1')
    if num_workers == 0 and prefetch_factor is not None:
        raise ConfigError(f'prefetch_factor={prefetch_factor} needs num_workers of at least 1')
    processor, lengths = dataset.processor, dataset.lengths
    collate = Collator(processor.family, pad_token_id=processor.tokenizer.pad_token_id, pack=pack_to_max_length)
    if pack_to_max_length:
        plan = partial(plan_packs, lengths, max_length=dataset.max_length, seed=seed)
    else:
        plan = partial(
            plan_batches, lengths, batch_size=batch_size, seed=seed, shuffle=shuffle, group_by_length=group_by_length
        )
    sampler = PackSampler(plan, accumulative_counts=accumulative_counts, rank=rank, world_size=world_size, tail=tail)
    return StepDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        generator=torch.Generator().manual_seed(seed),  # its own: iterating must not draw from the global one
    )
