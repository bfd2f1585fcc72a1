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

    Behind a skipped step (``max_skipped_steps``) it waits for one that goes well: the weights may be what is wrong.

    Args:
        interval: optimizer steps between checkpoints; -1 saves at the end only.
        max_keep_ckpts: newest checkpoints to keep; -1 keeps all. Old ones go after the new one is safe.
        save_optimizer: without it, checkpoints are smaller and a run cannot be resumed from them.
    """

    priority = 'VERY_LOW'  # after the schedulers have moved on

    def __init__(self, interval: int = 500, *, max_keep_ckpts: int = -1, save_optimizer: bool = True) -> None:
        self.interval, self.max_keep_ckpts, self.save_optimizer = interval, max_keep_ckpts, save_optimizer
        self._due = False

    def before_train(self, runner: Any) -> None:
        """Say what checkpoints cannot do, finish what a kill left, and stop where there is no room for one.

        Raises:
            CheckpointError: the disk of the work dir is too full.
        """
        if not self.save_optimizer:
            logger.warning('save_optimizer=False: checkpoints hold weights only, this run cannot be resumed')
        if runner._resume is True and runner.rank == 0:  # a kill right behind a save leaves what it would have removed
            checkpoint.purge(Path(runner.work_dir), keep=self.max_keep_ckpts)
        runner.saver.check_space(Path(runner.work_dir), save_optimizer=self.save_optimizer)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save when it is time."""
        done = runner.iter + 1
        self._due = self._due or (self.interval > 0 and done % self.interval == 0)
        if self._due and runner.train_loop.skipped_step and done < runner.max_iters:
            logger.warning('iteration %d was skipped: saving waits for a step that goes well', done)
        elif self._due or done == runner.max_iters:
            self._due = False
            self.save(runner)

    def save(self, runner: Any) -> Path:
        """Save the step that was just done, unless it is saved; called by all ranks where a step has ended.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        done = runner.iter + 1
        target = Path(runner.work_dir, checkpoint.checkpoint_name(done))
        if runner.saver.last != done:
            runner.save_checkpoint(runner.work_dir, target.name, save_optimizer=self.save_optimizer)
            logger.info('saved %s%s', target, '' if self.save_optimizer else ' (weights only: it cannot be resumed)')
            if runner.rank == 0:
                checkpoint.purge(Path(runner.work_dir), keep=self.max_keep_ckpts)
        return target
