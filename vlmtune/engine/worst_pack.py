"""The hardest micro-batches of a run, and one step on one of them."""

import time
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config

from vlmtune.data import Processor, StepDataLoader
from vlmtune.engine.build import build_model
from vlmtune.engine.hooks.throughput import peak_memory_mib
from vlmtune.engine.memory import Load, MemoryModel, state_bytes_per_weight
from vlmtune.engine.optim import PartwiseOptimWrapperConstructor
from vlmtune.engine.out_of_memory import explain_out_of_memory
from vlmtune.structures import IGNORE_INDEX, SampleKey
from vlmtune.utils.device import is_out_of_memory


@dataclass(frozen=True)
class Pack:
    """A micro-batch that a run will learn."""

    keys: tuple[SampleKey, ...]
    load: Load


class PlanSummary(NamedTuple):
    """All micro-batches of a run, over all ranks.

    Attributes:
        epochs: that are begun.
        packs: in the first epoch.
        first_steps: optimizer steps of the first epoch.
        steps: of the run.
        density: of the first epoch: tokens that are no padding, as a share of the room in its rows.
        longest: most tokens, padding included.
        most_patches: for the vision encoder; None without images.
    """

    epochs: int
    packs: int
    first_steps: int
    steps: int
    density: float
    longest: Pack
    most_patches: Pack | None


def summarise_plan(loader: StepDataLoader, *, steps: int) -> PlanSummary:
    """Go through the plans of a run; no sample is read.

    Args:
        loader: its sampler is left at the start of the first epoch.
        steps: of the run.
    """
    sampler: Any = loader.batch_sampler
    counts = _SampleCounts(loader.dataset, packed=is_packed(loader))
    found, done, epoch = [], 0, 0
    while done < steps:
        sampler.start_epoch(epoch)
        found.append(counts.hardest(sampler.plan, epoch=epoch))
        done, epoch = done + len(sampler), epoch + 1
    sampler.start_epoch(0)
    most_patches = max((images for _, images, _ in found), key=lambda pack: pack.load.patches)
    return PlanSummary(
        epochs=epoch,
        packs=len(sampler.plan),
        first_steps=len(sampler),
        steps=steps,
        density=found[0][2],
        longest=max((longest for longest, _, _ in found), key=lambda pack: pack.load.tokens),
        most_patches=most_patches if most_patches.load.patches else None,
    )


def is_packed(loader: StepDataLoader) -> bool:
    """Whether a micro-batch is one row of joined samples."""
    collate: Any = loader.collate_fn
    return collate.pack


class _SampleCounts:
    """Sums over the samples of packs."""

    def __init__(self, dataset: Any, *, packed: bool) -> None:
        self.lengths, self.patches, self.supervised = dataset.lengths, dataset.patches, dataset.supervised
        self.packed, self.max_length = packed, dataset.max_length

    def hardest(self, plan: list[list[int]], *, epoch: int) -> tuple[Pack, Pack, float]:
        """The pack with most tokens, the one with most patches, and the density of all."""
        samples = np.fromiter(chain.from_iterable(plan), dtype=np.int64)
        sizes = np.array([len(pack) for pack in plan])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        real = np.add.reduceat(self.lengths[samples], starts)
        tokens = real if self.packed else sizes * np.maximum.reduceat(self.lengths[samples], starts)
        patches = np.add.reduceat(self.patches[samples], starts)
        supervised = np.add.reduceat(self.supervised[samples], starts)

        def pack(at: int) -> Pack:
            load = Load(int(tokens[at]), int(patches[at]), int(supervised[at]))
            return Pack(tuple(SampleKey(epoch, index) for index in plan[at]), load)

        room = len(plan) * self.max_length if self.packed else tokens.sum()
        longest = np.lexsort((patches, tokens))[-1]
        return pack(longest), pack(np.lexsort((tokens, patches))[-1]), float(real.sum() / room)


class PackRun(NamedTuple):
    """What one optimizer step on one micro-batch took."""

    loss: float  # per supervised token
    seconds: float  # without loading the images; kernels that are tuned in their first run included
    peak_mib: float


def run_pack(cfg: Config, *, processor: Processor, loader: StepDataLoader, pack: Pack, device: torch.device) -> PackRun:
    """Load the weights and learn one micro-batch in this process alone; nothing is kept.

    Raises:
        TrainingError: it does not fit; the settings that would are named.
    """
    keys = list(pack.keys)
    batch = loader.collate_fn([loader.dataset[key] for key in keys])
    model = build_model(cfg, processor=processor)
    if model.quantization is None or device.type == 'cpu':  # quantised weights are made where they belong
        model.to(device)
    wrapper = PartwiseOptimWrapperConstructor(cfg.optim_wrapper)(model)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        supervised = int((batch['labels'][:, 1:] != IGNORE_INDEX).sum())
        loss = model.train()(**inputs) / max(supervised, 1)
        loss.backward()
        wrapper.clip_and_step()
        value = loss.item()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(
            error,
            memory=MemoryModel(model, state_bytes=state_bytes_per_weight(cfg.optim_wrapper.optimizer)),
            dataset=loader.dataset,
            batch=batch,
            pack=keys,
            device=device,
            at='in the dry run',
        ) from error
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return PackRun(value, time.perf_counter() - started, peak_memory_mib(device))
