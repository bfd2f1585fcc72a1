"""Saves while training."""

import logging
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from vlmtune.engine import checkpoint, ranks
from vlmtune.engine.monitor import Monitor, Rule
from vlmtune.registry import HOOKS
from vlmtune.utils.errors import CheckpointError

logger = logging.getLogger(__name__)


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves every ``interval`` optimizer steps and at the end.

    Behind a skipped step (``max_skipped_steps``) it waits for one that goes well: the weights may be what is wrong.

    Args:
        interval: optimizer steps between checkpoints; -1 saves at the end only.
        max_keep_ckpts: newest checkpoints to keep; -1 keeps all. Old ones go after the new one is safe.
        save_optimizer: without it, checkpoints are smaller and a run cannot be resumed from them.
        save_best: a score of the validation, 'val/loss' or 'val/cer': the step at which it was best is saved, stays
            besides the newest ones, and is named by the file ``best_checkpoint`` of the work dir.
        rule: 'greater' or 'less' is better; None: what the metric says.
    """

    priority = 'VERY_LOW'  # after the schedulers have moved on

    def __init__(
        self,
        interval: int = 500,
        *,
        max_keep_ckpts: int = -1,
        save_optimizer: bool = True,
        save_best: str | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.interval, self.max_keep_ckpts, self.save_optimizer = interval, max_keep_ckpts, save_optimizer
        asked_by = 'default_hooks.checkpoint.save_best'
        self.monitor = None if save_best is None else Monitor(save_best, rule=rule, asked_by=asked_by)
        self._due = False

    def before_train(self, runner: Any) -> None:
        """Say what checkpoints cannot do, finish what a kill left, and stop where there is no room for one.

        Raises:
            CheckpointError: the disk of the work dir is too full.
        """
        if not self.save_optimizer:
            logger.warning('save_optimizer=False: checkpoints hold weights only, this run cannot be resumed')
        if self.monitor is not None and runner.val_loop is not None:
            self.monitor.ask(runner.val_loop.evaluator)
            self._name_best(runner)
        if runner.resume_setting is True and runner.rank == 0:
            # A kill right behind a save leaves what it would have removed.
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

    def after_val(self, runner: Any) -> None:
        """Save what is the best so far, and the step at which a run stops early.

        Raises:
            ConfigError: there is no such score as ``save_best``.
        """
        history, done = runner.val_loop.history, runner.train_loop.steps_done
        if self.monitor is not None:
            self.monitor.check_last(history)
        is_best = self.monitor is not None and self.monitor.best(history) == len(history) - 1
        if done and (is_best or runner.train_loop.stop_training):
            self.save(runner)
        if is_best:
            self._name_best(runner)
            if runner.rank == 0:  # the one before it is a checkpoint like any other now
                checkpoint.purge(Path(runner.work_dir), keep=self.max_keep_ckpts)

    def _name_best(self, runner: Any) -> None:
        """Let ``best_checkpoint`` name the best of all validations, if it is there."""
        history = runner.val_loop.history
        best = None if self.monitor is None else self.monitor.best(history)
        if self.monitor is None or best is None:
            return
        target = Path(runner.work_dir, checkpoint.checkpoint_name(history[best]['iteration']))
        with ranks.together('naming the best checkpoint'):
            if runner.rank != 0 or not target.is_dir():  # not there: of another work dir, or before the first step
                return
            try:
                checkpoint.point_to(target, pointer=checkpoint.BEST_POINTER)
            except OSError as error:
                file = target.with_name(checkpoint.BEST_POINTER)
                raise CheckpointError(f'{file} could not be written: {error.strerror or error}') from error
        name = self.monitor.name
        logger.info('the best val/%s so far, %.4f, is that of %s', name, history[best][name], target.name)

    def save(self, runner: Any) -> Path:
        """Save the steps that are done, unless they are saved; called by all ranks where a step has ended.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        done = runner.train_loop.steps_done
        target = Path(runner.work_dir, checkpoint.checkpoint_name(done))
        if runner.saver.last != done:
            runner.save_checkpoint(runner.work_dir, target.name, save_optimizer=self.save_optimizer)
            logger.info('saved %s%s', target, '' if self.save_optimizer else ' (weights only: it cannot be resumed)')
            if runner.rank == 0:
                checkpoint.purge(Path(runner.work_dir), keep=self.max_keep_ckpts)
        return target
