"""``vlmtune train``: from a config to a trained checkpoint."""

import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from mmengine.config import Config
from mmengine.dist import get_rank

from vlmtune.apps.dry_run import dry_run as dry_run_of
from vlmtune.apps.parts_table import parts_table, write_parts
from vlmtune.config import config_mistakes, load_config
from vlmtune.engine import Runner, checkpoint, ranks
from vlmtune.engine.deepspeed_config import find_config
from vlmtune.engine.foreign_weights import check_loadable
from vlmtune.engine.group import in_group, read_together
from vlmtune.engine.manifest import read_manifest
from vlmtune.engine.precheck import check_settings, check_work_dir
from vlmtune.engine.resuming import check_resumable
from vlmtune.engine.run_layout import PARTS_FILE
from vlmtune.engine.setup import Launcher, restarts
from vlmtune.engine.signals import check_requeue_exit_code, leave_at_once
from vlmtune.engine.work_dir_lock import only_run_in

if TYPE_CHECKING:
    from mmengine.hooks import Hook  # imported first, it would bring all that mmengine's runner can do without

logger = logging.getLogger(__name__)

_REQUIRED = ('processor', 'model', 'train_dataloader', 'optim_wrapper', 'train_cfg', 'randomness')


def prepare_config(
    config: str,
    *,
    work_dir: str | None = None,
    resume: str | bool = False,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    launcher: Launcher = 'none',
    deepspeed: str | None = None,
    reset_optimizer: bool = False,
    writes: bool = True,
) -> Config:
    """Read a config and put what the command line says into it; the arguments are those of ``train``.

    ``writes`` is False for what only looks: an earlier run in the work dir is no mistake then.

    Raises:
        ConfigError: every mistake in the config and the overrides, at once; a work dir of another run.
        CheckpointError: ``resume`` names a checkpoint that cannot be used.
    """
    cfg = load_config(config, overrides, check=partial(config_mistakes, required=_REQUIRED))
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'work_dirs/{Path(str(cfg.filename)).stem}'
    cfg.launcher = launcher
    if seed is not None:
        cfg.randomness.seed = seed
    if resume:
        cfg.resume = resume
    if reset_optimizer:
        cfg.reset_optimizer = True
    check_requeue_exit_code(cfg)
    if writes and not (launcher == 'pytorch' and restarts()):
        check_work_dir(cfg.work_dir, resume=cfg.get('resume', False))
    check_resumable(
        cfg.get('resume', False), work_dir=Path(cfg.work_dir)
    )  # one rank reads its bytes, when it is loaded
    if isinstance(cfg.get('resume'), str):
        cfg.load_from = None
    if cfg.get('load_from'):
        check_loadable(cfg.load_from)
    if deepspeed is not None:
        cfg.strategy = dict(type='vlmtune.engine.DeepSpeedStrategy', config=str(find_config(deepspeed)))
    return cfg


def train(
    config: str,
    *,
    work_dir: str | None = None,
    resume: str | bool = False,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    launcher: Launcher = 'none',
    deepspeed: str | None = None,
    reset_optimizer: bool = False,
    dry_run: bool = False,
) -> None:
    """Train as the config says.

    Args:
        config: path of a config or name of a built-in recipe.
        work_dir: where checkpoints and logs go; ``work_dirs/<recipe>`` if neither this nor the config says.
        resume: True continues from the newest valid checkpoint of the work dir, or starts fresh if there is none; a
            path continues from that one.
        overrides: ``--cfg-options``.
        seed: overrides ``randomness.seed``.
        launcher: 'none', 'pytorch', 'slurm'.
        deepspeed: a ZeRO preset or the path of a json file.
        reset_optimizer: a resumed run takes weights, schedules and the position in the data, and starts its optimizer
            anew.
        dry_run: check config and data, say what would be trained, try the hardest pack where there is an accelerator,
            and stop; nothing is trained.

    Raises:
        UserError: anything that the user can mend.
        Stopped: a signal asked for it; its exit code says which.
    """
    read = partial(
        prepare_config, config, work_dir=work_dir, resume=resume, overrides=overrides, seed=seed, launcher=launcher,
        deepspeed=deepspeed, reset_optimizer=reset_optimizer, writes=not dry_run,
    )  # fmt: skip
    with leave_at_once() as leaving, in_group():
        cfg = read_together(read, launcher=launcher, with_strategy=True)
        leaving.requeue_exit_code = cfg.get('requeue_exit_code')
        with ranks.together('checking the settings'):
            if cfg.randomness.get('seed') is None:
                cfg.randomness.seed = secrets.randbelow(2**31)
            hooks = check_settings(cfg)
        _agree(cfg)
        _run(cfg, hooks, dry_run=dry_run)


def _agree(cfg: Config) -> None:
    """What the first rank has drawn, or seen on its disk, holds for all."""
    again = cfg.launcher == 'pytorch' and restarts() > 0 and _has_progress(cfg)
    cfg.randomness.seed, again = ranks.gather((cfg.randomness.seed, again), what='agreeing on the seed')[0]
    if again:
        logger.info('restart %d by torchrun: goes on from the newest checkpoint of %s', restarts(), cfg.work_dir)
        cfg.resume, cfg.load_from, cfg.reset_optimizer = True, None, False


def _has_progress(cfg: Config) -> bool:
    """Whether there is a checkpoint that the group has saved before it was started again.

    Without ``resume`` the work dir was empty when it began. Otherwise torchrun, our parent, is older than what is new.
    """
    newest = checkpoint.find_latest(Path(cfg.work_dir), hashes=False).path
    if newest is None or not cfg.get('resume'):
        return newest is not None
    return read_manifest(newest)['saved_at'] > psutil.Process(os.getppid()).create_time()


def _run(cfg: Config, hooks: 'list[Hook]', *, dry_run: bool) -> None:
    if dry_run:
        dry_run_of(cfg)
        return
    with only_run_in(Path(cfg.work_dir), rank=get_rank()), closing(Runner.from_cfg(cfg, hooks=hooks)) as runner:
        parts, lr = runner.model.report(), cfg.optim_wrapper.optimizer.lr
        logger.info('parts\n%s', parts_table(parts, lr=lr))
        if get_rank() == 0:
            write_parts(parts, Path(runner.log_dir, PARTS_FILE), lr=lr)
        runner.train()
        logger.info('done: %s', runner.work_dir)
