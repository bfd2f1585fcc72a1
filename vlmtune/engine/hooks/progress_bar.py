"""A progress bar, where there is a terminal to draw it on."""

import sys
from typing import Any

from mmengine.hooks import Hook
from tqdm import tqdm

from vlmtune.registry import HOOKS


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Draws steps done, time left and the last loss on the first rank's terminal; nothing into files and pipes."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def before_train(self, runner: Any) -> None:
        """Draw it."""
        if runner.rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=runner.max_iters, initial=runner.iter, unit='step', dynamic_ncols=True)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update()
            if 'loss' in outputs:  # not of a step that was skipped
                self._bar.set_postfix(loss=f'{outputs["loss"]:.4f}', refresh=False)

    def after_train(self, runner: Any) -> None:
        """Leave the finished bar behind."""
        if self._bar is not None:
            self._bar.close()
