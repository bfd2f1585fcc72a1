"""``vlmtune train --dry-run``: what a run would be, before it costs anything."""

from typing import Any

from mmengine.config import Config
from mmengine.dist import get_dist_info

from vlmtune.apps.parts_table import parts_table
from vlmtune.data import StepDataLoader
from vlmtune.engine.build import build_data, build_model, build_validation
from vlmtune.engine.deepspeed_config import config_of
from vlmtune.engine.hooks.dataset_info import describe_data
from vlmtune.engine.loops import count_steps
from vlmtune.engine.memory import Load, MemoryEstimate, MemoryModel, Sharding, state_bytes_per_weight
from vlmtune.engine.out_of_memory import device_memory, name_samples
from vlmtune.engine.worst_pack import Pack, PlanSummary, is_packed, run_pack, summarise_plan
from vlmtune.utils.device import find_device

_GIB = 2**30


def dry_run(cfg: Config) -> None:
    """Print parts, data, packs, steps and memory; run the hardest pack once where there is an accelerator.

    The data is read and planned as for training. The model is built without weights, so a large one costs seconds.
    Nothing is written, but for the cache of the plan.

    Raises:
        UserError: anything that training would stop at before its first step; a pack that does not fit the device.
    """
    processor, loader = build_data(cfg)
    model = build_model(cfg, processor=processor, device='meta')
    rank, ranks = get_dist_info()
    sharding = Sharding.from_deepspeed(config_of(cfg.get('strategy')), ranks=ranks)
    memory = MemoryModel(model, state_bytes=state_bytes_per_weight(cfg.optim_wrapper.optimizer), sharding=sharding)
    said = ['parts\n' + parts_table(model.report(), lr=cfg.optim_wrapper.optimizer.lr)]
    if hasattr(loader.dataset, 'lengths'):
        limits = {name: cfg.train_cfg.get(name) for name in ('max_epochs', 'max_steps')}
        plan = summarise_plan(loader, steps=count_steps(loader.batch_sampler, **limits))  # type: ignore[arg-type]
        worst = max((plan.longest, plan.most_patches or plan.longest), key=lambda p: memory.estimate(p.load).total)
        said += [f'data: {describe_data(loader.dataset)}', describe_plan(plan, loader)]
        load = worst.load
        if cfg.get('vision_cache') is not None:
            load = load._replace(patches=0)
            said.append(
                'vision_cache: not built here; the estimate is for stored features, but the pack that runs has pixels'
            )
        said += [describe_memory(memory.estimate(load), sharding=sharding)]
        options = dict(processor=processor, loader=loader, pack=worst)
        said += [_run_worst_pack(cfg, sharded=sharding.stage > 0, **options)]
    else:
        dataset: Any = loader.dataset
        length = dataset.max_length
        full = Load(tokens=length, patches=0, supervised=length)
        said += ['data: a stream; its packs are not known beforehand']
        said += [describe_memory(memory.estimate(full), sharding=sharding)]
    if (validation := build_validation(cfg, processor=processor)) is not None:
        questions = len(validation['questions'] or ())
        said.append(f'validation: {describe_data(validation["dataloader"].dataset)}; {questions:,} questions')
    if rank == 0:
        print('\n'.join(said), 'nothing was trained and nothing was saved', sep='\n')


def describe_plan(plan: PlanSummary, loader: StepDataLoader) -> str:
    """Packs, steps and the hardest packs."""
    epochs = '1 epoch' if plan.epochs == 1 else f'{plan.epochs} epochs'
    name = 'packs' if is_packed(loader) else 'batches'
    lines = [
        f'{name}: {plan.packs:,} in the first epoch, density {plan.density:.3f}; '
        f'{plan.first_steps:,} optimizer steps in the first epoch, {plan.steps:,} in all ({epochs})',
        f'longest: {_describe_pack(plan.longest, loader.dataset)}',
    ]
    if plan.most_patches is not None:
        lines.append(f'most image patches: {_describe_pack(plan.most_patches, loader.dataset)}')
    return '\n'.join(lines)


def _describe_pack(pack: Pack, dataset: Any) -> str:
    load = pack.load
    return f'{load.tokens:,} tokens, {load.patches:,} patches: {name_samples(dataset, pack.keys)}'


def describe_memory(estimate: MemoryEstimate, *, sharding: Sharding) -> str:
    """The estimate for the hardest pack, per process."""
    parts = ', '.join(f'{name} {size / _GIB:.2f}' for name, size in estimate._asdict().items())
    zero = f', ZeRO stage {sharding.stage} over {sharding.ranks} processes' if sharding.stage else ''
    return f'memory, estimated for the hardest pack, GiB per process{zero}: {parts}; in all {estimate.total / _GIB:.2f}'


def _run_worst_pack(cfg: Config, *, sharded: bool, **options: Any) -> str:
    device = find_device()
    if device.type == 'cpu':
        return 'the hardest pack was not run: there is no accelerator here'
    if sharded:
        return 'the hardest pack was not run: one process alone cannot show what DeepSpeed divides'
    ran = run_pack(cfg, device=device, **options)
    return (
        f'the hardest pack ran on {device} in {ran.seconds:.2f} s, loss {ran.loss:.3f}; '
        f'peak memory {ran.peak_mib / 1024:.2f} of {device_memory(device) / _GIB:.2f} GiB'
    )
