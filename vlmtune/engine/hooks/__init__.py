"""What happens around the steps, one hook per file."""

from vlmtune.engine.hooks.checkpoint import CheckpointHook
from vlmtune.engine.hooks.dataset_info import DatasetInfoHook
from vlmtune.engine.hooks.early_stopping import EarlyStoppingHook
from vlmtune.engine.hooks.evaluate_chat import EvaluateChatHook
from vlmtune.engine.hooks.isolation import IsolationHook
from vlmtune.engine.hooks.metrics_file import MetricsFileHook
from vlmtune.engine.hooks.progress_bar import ProgressBarHook
from vlmtune.engine.hooks.throughput import ThroughputHook

__all__ = [
    'CheckpointHook',
    'DatasetInfoHook',
    'EarlyStoppingHook',
    'EvaluateChatHook',
    'IsolationHook',
    'MetricsFileHook',
    'ProgressBarHook',
    'ThroughputHook',
]
