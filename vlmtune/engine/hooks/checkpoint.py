"""Saves while training."""

import logging
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from vlmtune.engine import checkpoint
from vlmtune.registry import HOOKS

logger = logging.getLogger(__name__)


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves every ``interval`` optimizer steps and at the end.

    Args:
        interval: optimizer steps between checkpoints; -1 saves at the end only.
        max_keep_ckpts: newest checkpoints to keep; -1 keeps all. Old ones go after the new one is safe.
        save_optimizer: without it, checkpoints are smaller and a run cannot be resumed from them.
    """

    priority = 'VERY_LOW'  # after the schedulers have moved on

    def __init__(self, interval: int = 500, *, max_keep_ckpts: int = -1, save_optimizer: bool = True) -> None:
        self.interval, self.max_keep_ckpts, self.save_optimizer = interval, max_keep_ckpts, save_optimizer

    def before_train(self, runner: Any) -> None:
        """Say what cannot be done with the checkpoints."""
        if not self.save_optimizer:
            logger.warning('save_optimizer=False: checkpoints hold weights only, this run cannot be resumed')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save when it is time."""
        done = runner.iter + 1
        if (self.interval > 0 and done % self.interval == 0) or done == runner.max_iters:
            name = checkpoint.checkpoint_name(done)
            runner.save_checkpoint(runner.work_dir, name, save_optimizer=self.save_optimizer)
            logger.info('saved %s', Path(runner.work_dir, name))
            if runner.rank == 0:
                checkpoint.purge(Path(runner.work_dir), keep=self.max_keep_ckpts)
