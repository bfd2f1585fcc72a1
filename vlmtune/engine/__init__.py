"""The run: Runner, loop, strategies, optimizer groups, checkpoints, hooks."""

import vlmtune.utils.lean_imports  # noqa: F401  # before anything that imports mmengine.runner
from vlmtune.engine.deepspeed import DeepSpeedStrategy
from vlmtune.engine.hooks import (
    CheckpointHook,
    DatasetInfoHook,
    EarlyStoppingHook,
    EvaluateChatHook,
    MetricsFileHook,
    ProgressBarHook,
    ThroughputHook,
)
from vlmtune.engine.log_line import LogLine
from vlmtune.engine.loops import TrainLoop
from vlmtune.engine.optim import PartwiseOptimWrapperConstructor
from vlmtune.engine.runner import Runner
from vlmtune.engine.strategies import DDPStrategy, SingleDeviceStrategy
from vlmtune.engine.val_loop import ValLoop

__all__ = [
    'CheckpointHook',
    'DDPStrategy',
    'DatasetInfoHook',
    'DeepSpeedStrategy',
    'EarlyStoppingHook',
    'EvaluateChatHook',
    'LogLine',
    'MetricsFileHook',
    'PartwiseOptimWrapperConstructor',
    'ProgressBarHook',
    'Runner',
    'SingleDeviceStrategy',
    'ThroughputHook',
    'TrainLoop',
    'ValLoop',
]
