"""What to say when a step runs out of memory: which samples, and which settings would fit."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtune.engine.memory import Load, MemoryModel
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX, Sample, SampleKey
from vlmtune.utils.errors import TrainingError, first_line

_NAMED = 8  # samples in the message
_USABLE = 0.92  # of a device's memory; the rest goes to context and fragmentation
_GIB = 2**30


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device, or of the machine."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def explain_out_of_memory(
    error: RuntimeError,
    *,
    memory: MemoryModel,
    dataset: Any,
    batch: Mapping[str, Tensor],
    pack: Sequence[SampleKey],
    device: torch.device,
    at: str,
) -> TrainingError:
    """The error to raise instead: what was in the micro-batch, and what would fit, by estimate.

    Args:
        error: the allocator's.
        memory: of the model.
        dataset: of the samples.
        batch: the micro-batch.
        pack: its samples.
        device: that has no more memory.
        at: when it happened, for example 'at iteration 3'.
    """
    load = Load(
        tokens=batch['input_ids'].numel(),
        patches=0 if 'image_features' in batch else sum(dataset.samples[key.sample].patches for key in pack),
        supervised=int((batch['labels'][:, 1:] != IGNORE_INDEX).sum()),
    )
    advice = what_would_fit(
        memory, load, capacity=device_memory(device), max_length=dataset.max_length, samples=len(pack),
        padded='attention_mask' in batch,
    )  # fmt: skip
    return TrainingError(
        f'out of memory {at} on {device} ({first_line(error)}); the micro-batch has '
        f'{load.tokens:,} tokens and {load.patches:,} patches in {len(pack)} samples: '
        f'{name_samples(dataset, pack)}. {advice}'
    )


def name_samples(dataset: Any, pack: Sequence[SampleKey]) -> str:
    """Where the samples of a pack come from and what each brings; the first eight, largest first."""
    found = [(dataset.samples[key.sample], dataset.where(key.sample)) for key in pack]
    found.sort(key=lambda pair: -len(pair[0]))
    named = [f'{where} ({len(sample):,} tokens{_images(sample)})' for sample, where in found[:_NAMED]]
    more = f' and {len(found) - _NAMED} more' if len(found) > _NAMED else ''
    return ', '.join(named) + more


def _images(sample: Sample) -> str:
    count = len(sample.images)
    return f', {count} {"image" if count == 1 else "images"}, {sample.patches:,} patches' if count else ''


def what_would_fit(
    memory: MemoryModel, load: Load, *, capacity: int, max_length: int, samples: int = 1, padded: bool = False
) -> str:
    """Settings under which the estimate stays within the device, in words.

    Where the estimate is lower than what the device has, though memory ran out, it is scaled up to that.

    Args:
        memory: of the model.
        load: of the micro-batch.
        capacity: bytes of the device.
        max_length: tokens per pack, as set.
        samples: in the micro-batch.
        padded: whether they are rows of one batch, not one pack.
    """
    now = memory.estimate(load)
    usable = capacity * _USABLE
    said = f'Estimated need {_gib(now.total)} ({_gib(now.fixed)} without activations), the device has {_gib(capacity)}'
    room = (usable - now.fixed) / max(now.total - now.fixed, usable - now.fixed)  # share of this load that fits
    fits = []
    if now.fixed < usable:
        share = min(max(room, 0.0), 0.9)
        fits += _smaller_loads(share, load, memory, max_length=max_length, samples=samples, padded=padded)
    if not memory.checkpointed['llm']:
        fits.append(f'gradient_checkpointing=True ({_gib(memory.estimate(load, checkpointing=True).total)})')
    if memory.model.quantization is None and memory.model.plans['llm'].mode != 'full':
        fits.append(f"quantization='nf4' ({_gib(memory.estimate(load, quantization='nf4').total)})")
    if memory.sharding.stage < 3 and memory.sharding.ranks > 1 and _can_be_cut(memory.model):
        fits.append('--deepspeed zero3')
    return f'{said}. Estimated to need less: {"; ".join(fits)}'


def _can_be_cut(model: SupervisedFinetune) -> bool:
    """Whether ZeRO-3 takes the weights; see ``sharded_loading.check_sharding``."""
    return model.quantization is None and not getattr(model.lora_config, 'use_dora', False)


def _smaller_loads(
    share: float, load: Load, memory: MemoryModel, *, max_length: int, samples: int, padded: bool
) -> list[str]:
    fits = []
    if padded and samples > 1:
        fits.append(f'batch_size={max(1, int(samples * share))}')
    else:
        fits.append(f'max_length={_rounded(max_length * share)}')
    if load.patches:
        if (setting := memory.model.family.image_limit) is not None:
            fits.append(f'{setting} at {share:.0%} of what it is')
        if not padded:
            fits.append(f'train_dataloader.max_patches={_rounded(load.patches * share)}')
    return fits


def _rounded(number: float) -> int:
    """Down to a multiple of 64; numbers below that stay."""
    return int(number) // 64 * 64 or int(number)


def _gib(size: float) -> str:
    return f'{size / _GIB:.1f} GiB'
