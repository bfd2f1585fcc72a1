"""``vlmtune train``: from a config to a trained checkpoint."""

import logging
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import broadcast_object_list

from vlmtune.apps.dry_run import dry_run as dry_run_of
from vlmtune.apps.parts_table import parts_table
from vlmtune.config import config_mistakes, load_config
from vlmtune.engine import Runner
from vlmtune.engine.checkpoint import verify
from vlmtune.engine.precheck import check_settings, check_work_dir
from vlmtune.engine.setup import Launcher, init_distributed
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)

_REQUIRED = ('processor', 'model', 'train_dataloader', 'optim_wrapper', 'train_cfg', 'randomness')
_PRESETS = Path(__file__).resolve().parents[1] / 'presets' / 'deepspeed'


def deepspeed_config(name_or_path: str) -> str:
    """The json file of a ZeRO preset ('zero2'; XTuner's 'deepspeed_zero2' means the same) or of a path.

    Raises:
        ConfigError: neither a preset nor a file.
    """
    preset = _PRESETS / f'{name_or_path.removeprefix("deepspeed_")}.json'
    for candidate in (preset, Path(name_or_path)):
        if candidate.is_file():
            return str(candidate)
    known = ', '.join(sorted(path.stem for path in _PRESETS.glob('*.json')))
    raise ConfigError(f'--deepspeed {name_or_path}: not a preset ({known}) and not a json file')


def prepare_config(
    config: str,
    *,
    work_dir: str | None = None,
    resume: str | bool = False,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    launcher: Launcher = 'none',
    deepspeed: str | None = None,
) -> Config:
    """Read a config and put what the command line says into it.

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
    check_work_dir(cfg.work_dir, resume=cfg.get('resume', False))
    if isinstance(cfg.get('resume'), str):
        verify(Path(cfg.resume))
        cfg.load_from = None
    if cfg.get('load_from'):
        verify(Path(cfg.load_from))
    if deepspeed is not None:
        cfg.strategy = dict(type='vlmtune.engine.DeepSpeedStrategy', config=deepspeed_config(deepspeed))
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
        dry_run: check config and data, say what would be trained, try the hardest pack where there is an accelerator,
            and stop; nothing is trained.

    Raises:
        UserError: anything that the user can mend.
    """
    cfg = prepare_config(
        config, work_dir=work_dir, resume=resume, overrides=overrides, seed=seed, launcher=launcher, deepspeed=deepspeed
    )
    init_distributed(launcher, alone=cfg.get('strategy') is not None)
    try:
        if cfg.randomness.get('seed') is None:
            drawn = [secrets.randbelow(2**31)]
            broadcast_object_list(drawn)
            cfg.randomness.seed = drawn[0]
        check_settings(cfg)
        if dry_run:
            dry_run_of(cfg)
            return
        runner = Runner.from_cfg(cfg)
        logger.info('parts\n%s', parts_table(runner.model.report(), lr=cfg.optim_wrapper.optimizer.lr))
        runner.train()
        logger.info('done: %s', runner.work_dir)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
