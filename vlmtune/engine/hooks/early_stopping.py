"""Ends a run that no longer gets better."""

import logging
from typing import Any

from mmengine.hooks import Hook

from vlmtune.engine.monitor import Monitor, Rule
from vlmtune.registry import HOOKS
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


@HOOKS.register_module()
class EarlyStoppingHook(Hook):
    """Stops training when so many validations in a row were no better than the best one before them.

    The step it stops at is saved. It holds no state: the scores of all validations are in the checkpoints.

    Args:
        monitor: a score of the validation: 'val/loss', 'val/cer'.
        patience: validations that may pass without a better one.
        rule: 'greater' or 'less' is better; None: what the metric says.
        min_delta: what a value has to be better by to count; a value that is not finite never does.

    Raises:
        ConfigError: patience is not at least 1, min_delta is negative, or the rule is unknown.
    """

    priority = 'NORMAL'  # before the checkpoint hook, which saves where a run stops

    def __init__(self, monitor: str, *, patience: int = 3, rule: Rule | None = None, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ConfigError(
                f'EarlyStoppingHook: patience={patience}, min_delta={min_delta}; expected at least 1 and 0'
            )
        self.monitor = Monitor(monitor, rule=rule, asked_by='EarlyStoppingHook.monitor')
        self.patience, self.min_delta = patience, min_delta

    def before_train(self, runner: Any) -> None:
        """A resumed run may have had its last validation."""
        if runner.val_loop is not None:
            self.monitor.ask(runner.val_loop.evaluator)
            self._look(runner)

    def after_val(self, runner: Any) -> None:
        """Look back.

        Raises:
            ConfigError: there is no such score as ``monitor``.
        """
        self.monitor.check_last(runner.val_loop.history)
        self._look(runner)

    def _look(self, runner: Any) -> None:
        history = runner.val_loop.history
        best = self.monitor.best(history, min_delta=self.min_delta)
        since = len(history) if best is None else len(history) - 1 - best
        if since < self.patience:
            return
        runner.train_loop.stop_training = True
        name = f'val/{self.monitor.name}'
        told = f'{name} was never finite'
        if best is not None:
            row = history[best]
            told = f'{name} was {row[self.monitor.name]:.4f} at step {row["iteration"]} and has not become better since'
        logger.info('stopping early after %d validations: %s', since, told)
