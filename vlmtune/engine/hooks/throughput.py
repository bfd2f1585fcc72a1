"""Tokens per second and memory."""

import resource
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

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record one step, data loading included, saving and sample answers not."""
        loop, hub = runner.train_loop, runner.message_hub
        hub.update_scalar('train/tokens_per_second', loop.step_tokens / loop.step_seconds)
        hub.update_scalar('train/memory_mib', peak_memory_mib(runner.strategy.device))
