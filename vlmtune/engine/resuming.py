"""Lets a run go on from a checkpoint: where it stood, or as near to that as this run's ranks and settings allow."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.engine import checkpoint, load_from, ranks
from vlmtune.engine.checkpoint import TRAINER_FILE, WEIGHTS_FILE, rng_file
from vlmtune.engine.manifest import read_manifest, size_of, verify
from vlmtune.engine.schedules import fast_forward, load_schedules, schedule_changes
from vlmtune.engine.state import from_json, rng_state, seeded_rng_state, set_message_state, set_rng_state
from vlmtune.engine.validation_history import read_history
from vlmtune.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

_MOST_BYTES = 1 << 28  # of a json file of a checkpoint


class TrainerState(NamedTuple):
    """What ``trainer.json`` holds."""

    iteration: int
    seed: int
    packs_per_step: int  # over all ranks
    sampler: dict[str, Any]
    schedulers: list[dict[str, Any]]
    scaler: dict[str, Any]
    messages: dict[str, Any]
    validations: list[dict[str, Any]] = []  # noqa: RUF012  # never changed; older checkpoints have none


def load_or_resume(runner: Any) -> None:
    """Resume from, or start from the weights of, a checkpoint, as ``resume`` and ``load_from`` say; all ranks call it.

    Args:
        runner: a Runner whose strategy is prepared.

    Raises:
        CheckpointError: an explicit checkpoint is broken, foreign, or does not fit this run.
        RankFailed: another rank says so.
    """
    resume: bool | str = runner.resume_setting
    path = _find(resume, Path(runner.work_dir), rank=runner.rank) if resume else None
    if path is not None:
        with ranks.together(f'resuming from {path}'):
            resume_from(runner, path)
        return
    weights: str | None = runner.load_from
    if weights:
        with ranks.together(f'loading the weights of {weights}'):
            line = load_from.load_weights(runner, weights)
        logger.info('%s', line)
    elif resume:
        logger.info('nothing to resume in %s: starting fresh', runner.work_dir)


def _find(resume: bool | str, work_dir: Path, *, rank: int) -> Path | None:
    """The checkpoint to resume from; the first rank looks and reads every byte of it, the others get its answer."""
    path: Path | None = None
    with ranks.together('looking for a checkpoint to resume from'):
        if rank == 0 and isinstance(resume, str):
            path = Path(resume)
            verify(path)
        elif rank == 0:
            found = checkpoint.find_latest(work_dir)
            path = found.path
            for reason in found.skipped:
                logger.warning('passed over a broken checkpoint: %s', reason)
            if path is not None:
                checkpoint.point_to(path)  # a kill right behind a save leaves an older name there
    return ranks.gather(path, what='telling which checkpoint it is')[0]


def resume_from(runner: Any, path: Path) -> None:
    """Go on from a checkpoint that was verified.

    Raises:
        CheckpointError: it holds weights only, or does not fit this run.
    """
    manifest = read_manifest(path)
    _refuse_weights_only(path, manifest)
    _refuse_additions(path, manifest)
    trainer = _read_trainer(path, manifest)
    loop, strategy = runner.train_loop, runner.strategy
    reset = bool(runner.cfg.get('reset_optimizer', False))
    with _as_checkpoint_error(path / TRAINER_FILE):
        loop.sampler.load_state_dict(trainer.sampler)  # first: it tells at once whether this is the same data
    strategy.load_trainable(path / WEIGHTS_FILE)
    fresh = [dict(group, params=None) for group in runner.optim_wrapper.param_groups]
    if reset:
        _warn(runner, 'reset_optimizer: the optimizer starts without the moments of %s', path)
    else:
        strategy.load_optimizer(path)
    with _as_checkpoint_error(path / TRAINER_FILE):
        strategy.load_scaler_state(trainer.scaler)
        loop._iter = _go_on_at(runner, trainer)
        _set_schedules(runner, trainer, fresh=fresh, reset=reset)
        set_message_state(runner.message_hub, trainer.messages)
        runner.validations = read_history(trainer.validations)
    if path.absolute() == Path(runner.work_dir, checkpoint.checkpoint_name(loop.iter)).absolute():
        runner.saver.last = loop.iter
    loop.rng_to_restore = _rng_state_for(runner, path, manifest)
    if manifest['world_size'] != runner.world_size:
        logger.info('saved by %d processes, this run has %d', manifest['world_size'], runner.world_size)
    logger.info('resumed from %s at iteration %d of %d', path, loop.iter, loop.max_iters)


def check_resumable(resume: str | bool, *, work_dir: Path) -> None:
    """Tell what is wrong with the checkpoint that ``--resume`` means, without reading more than manifests.

    Args:
        resume: True: the newest checkpoint of the work dir, if there is one. Or the path of one.
        work_dir: of the run.

    Raises:
        CheckpointError: it is broken, foreign, holds weights only, or is the folder of checkpoints.
    """
    if not isinstance(resume, str):
        newest = checkpoint.find_latest(work_dir, hashes=False).path if resume else None
        if newest is not None:
            _refuse_weights_only(newest, read_manifest(newest))
        return
    path = Path(resume)
    inside = checkpoint.find_latest(path, hashes=False).path
    if inside is not None:
        raise CheckpointError(f'{path} is a work dir, expected a checkpoint: resume from {inside}')
    _refuse_weights_only(path, verify(path, hashes=False))


def _refuse_weights_only(path: Path, manifest: Mapping[str, Any]) -> None:
    if not manifest['resumable']:
        raise CheckpointError(
            f'{path} holds weights only (save_optimizer=False), so that nothing can be resumed from it; '
            'use load_from to start from them'
        )


def _warn(runner: Any, message: str, *values: object) -> None:
    """What holds for all ranks is said by one."""
    if runner.rank == 0:
        logger.warning(message, *values)


def _refuse_additions(path: Path, manifest: Mapping[str, Any]) -> None:
    added = [file.name for file in path.glob('optimizer_*') if file.name not in manifest['files']]
    if added:
        raise CheckpointError(f'{path}: {added[0]} was added after it was saved; remove it')


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Values that vlmtune never writes are found where they are used."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path} was changed: {type(error).__name__}: {error}') from error


def _read_state(path: Path, name: str) -> Any:
    if size_of(path, name) > _MOST_BYTES:
        raise CheckpointError(f'{path / name} is larger than {_MOST_BYTES} bytes; vlmtune did not write it')
    try:
        return from_json((path / name).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f'{path / name} cannot be read ({error})') from error


def _read_trainer(path: Path, manifest: Mapping[str, Any]) -> TrainerState:
    found = _read_state(path, TRAINER_FILE)
    kinds = TrainerState.__annotations__.keys()
    if not isinstance(found, dict) or not kinds - TrainerState._field_defaults.keys() <= found.keys():
        raise CheckpointError(f'{path / TRAINER_FILE} was changed: it lacks what vlmtune writes into it')
    trainer = TrainerState(**{name: found[name] for name in kinds & found.keys()})
    if type(trainer.iteration) is not int or trainer.iteration != manifest['iteration']:
        raise CheckpointError(
            f'{path / TRAINER_FILE} was changed: iteration {str(trainer.iteration)[:20]}, '
            f'the manifest says {manifest["iteration"]}'
        )
    if type(trainer.packs_per_step) is not int or trainer.packs_per_step < 1:
        raise CheckpointError(f'{path / TRAINER_FILE} was changed: packs_per_step {str(trainer.packs_per_step)[:20]}')
    return trainer


# ---- where the run goes on


def _go_on_at(runner: Any, trainer: TrainerState) -> int:
    """The optimizer steps that count as done."""
    if not _recount(runner, trainer):
        return int(trainer.iteration)
    steps = sum(runner.train_loop.sampler.steps_so_far())
    _warn(
        runner,
        'a step of this run takes %d packs, one of the checkpoint %d: its %d steps count as %d',
        runner.train_loop.sampler.packs_per_step, trainer.packs_per_step, trainer.iteration, steps,
    )  # fmt: skip
    return steps


def _recount(runner: Any, trainer: TrainerState) -> bool:
    """Whether steps have another size now and it is epochs that count, so that the data says where the run stands."""
    sampler = runner.train_loop.sampler
    return sampler.packs_per_step != trainer.packs_per_step and not sampler.endless and _counts_epochs(runner)


def _counts_epochs(runner: Any) -> bool:
    return runner.cfg.train_cfg.get('max_steps') is None


def _set_schedules(runner: Any, trainer: TrainerState, *, fresh: Sequence[Mapping[str, Any]], reset: bool) -> None:
    """Where the schedules stood; with other settings than the saved ones, where they would stand at this step."""
    schedulers, groups = list(runner.param_schedulers or []), runner.optim_wrapper.param_groups
    if not reset:
        _name_what_stays(runner, groups)
    changed = schedule_changes(schedulers, trainer.schedulers)
    if not reset and [group.get('initial_lr') for group in groups] != [group.get('initial_lr') for group in fresh]:
        rates = [[group.get('initial_lr') for group in some] for some in (fresh, groups)]
        changed.append('learning rates {}, not {}'.format(*rates))
    if not (reset or changed or _recount(runner, trainer)):
        load_schedules(schedulers, trainer.schedulers)
        return
    if changed:
        _warn(runner, 'the schedules are those of this config, at this step: %s', '; '.join(changed))
    for group, configured in zip(groups, fresh, strict=True):
        for name in {'lr', *(scheduler.param_name for scheduler in schedulers)}:
            group.update({key: configured[key] for key in (name, f'initial_{name}') if key in configured})
    fast_forward(schedulers, steps_of_epochs=_steps_of_epochs(runner))


def _name_what_stays(runner: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Settings of the optimizer come from the checkpoint; it is said where the config has others."""
    for name, value in runner.cfg.optim_wrapper.optimizer.items():
        found = [group[name] for group in groups if name in group and not str(group.get('name')).endswith('no_decay')]
        value = tuple(value) if isinstance(value, list) else value
        if name not in ('type', 'lr', 'params') and any(other != value for other in found):
            _warn(
                runner,
                'the checkpoint goes on with its own %s=%s, not %s; --reset-optimizer takes this',
                name, found[0], value,
            )  # fmt: skip


def _steps_of_epochs(runner: Any) -> list[int]:
    sampler, iteration = runner.train_loop.sampler, runner.train_loop.iter
    if sampler.endless:
        return [iteration]
    counted = sampler.steps_so_far()
    return counted if sum(counted) == iteration else [iteration] + [0] * (len(counted) - 1)


# ---- random generators


def _rng_state_for(runner: Any, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    name = rng_file(runner.rank)
    if name not in manifest['files']:
        logger.warning(
            'rank %d has no random generators in %s: seeded anew from seed, step and rank', runner.rank, path
        )
        return seeded_rng_state([runner.seed, runner.train_loop.iter, runner.rank])
    state, before = _read_state(path, name), rng_state()
    try:
        with _as_checkpoint_error(path / name):
            set_rng_state(state)  # a trial: the loop sets it when the first batch is there
    except RuntimeError as error:  # torch's word for a state that is none
        raise CheckpointError(f'{path / name} was changed: {error}') from error
    finally:
        set_rng_state(before)
    return state
