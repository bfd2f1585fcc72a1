"""Every scalar of every step in one file of JSON lines, whatever tracker is set."""

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from vlmtune.engine.run_layout import METRICS_FILE
from vlmtune.registry import HOOKS
from vlmtune.utils.json_lines import append_lines

_OF_THE_STEP = ('loss', 'grad_norm')


@HOOKS.register_module()
class MetricsFileHook(Hook):
    """Appends one JSON object per step to ``metrics.jsonl`` in the log folder of the run; numbers are not averaged.

    A step that was skipped because its loss or gradients were not finite has no ``loss`` or no ``grad_norm``.

    Args:
        interval: optimizer steps between lines.
    """

    priority = 'BELOW_NORMAL'  # after what makes the scalars

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write a line, on the first rank."""
        step = runner.iter + 1
        if runner.rank != 0 or step % self.interval:
            return
        missing = {f'train/{name}' for name in _OF_THE_STEP if name not in outputs}
        scalars = {
            name.removeprefix('train/'): float(history.current())
            for name, history in runner.message_hub.log_scalars.items()
            if name.startswith('train/') and name not in missing
        }
        append_lines(Path(runner.log_dir, METRICS_FILE), [dict(step=step, epoch=runner.epoch, **scalars)])
