"""Tokens per second and memory."""

import resource
import time
from typing import Any

import torch
from mmengine.hooks import Hook

from vlmtune.registry import HOOKS


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU where there is one, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds ``tokens_per_second`` (all ranks, image tokens included) and ``memory_mib`` to the log."""

    priority = 'ABOVE_NORMAL'  # before the logger

    def __init__(self) -> None:
        self._since = 0.0

    def before_train(self, runner: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record one step, data loading included."""
        now = time.perf_counter()
        runner.message_hub.update_scalar('train/tokens_per_second', runner.train_loop.step_tokens / (now - self._since))
        runner.message_hub.update_scalar('train/memory_mib', peak_memory_mib(runner.strategy.device))
        self._since = now
