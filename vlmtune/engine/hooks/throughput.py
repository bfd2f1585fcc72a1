"""How fast a run is, and where its time goes."""

import logging
import resource
import time
from typing import Any

import torch
from mmengine.hooks import Hook

from vlmtune.engine.flops import device_peak
from vlmtune.registry import HOOKS

logger = logging.getLogger(__name__)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU where there is one, else resident."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds speed, times and memory to the scalars of every step, and the time left to what the log shows.

    Of a step, data loading included, saving and sample answers not:

    - ``tokens_per_second``, ``learned_tokens_per_second``: over all ranks; image tokens count, padding does not
    - ``samples``: over all ranks
    - ``time``, ``data_time``, ``vision_time``, ``llm_time``, ``optimizer_time``: seconds, of the first rank; see
      ``StepTimes``
    - ``data_time_share``: of ``time``
    - ``tflops``: model TFLOP/s per device, the mean of all ranks; see ``engine/flops.py``
    - ``mfu``: its share of the device's dense bf16 peak, where that is known
    - ``memory_mib``: peak so far, of the first rank
    """

    priority = 'ABOVE_NORMAL'  # before the logger

    def before_train(self, runner: Any) -> None:
        """Name the device and the peak that MFU refers to."""
        name, self._peak = device_peak(runner.strategy.device)
        if runner.rank == 0 and self._peak is not None:
            logger.info('MFU refers to %g TFLOP/s, the dense bf16 peak of %s', self._peak, name)
        elif runner.rank == 0:
            logger.info('no MFU: the peak of this device (%s) is not known; TFLOP/s is logged', name)
        self._started, self._first = time.perf_counter(), runner.iter

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record one step."""
        counts, times = runner.train_loop.step_counts, runner.train_loop.step_times
        tflops = counts.flops / times.total / runner.world_size / 1e12
        scalars = dict(
            tokens_per_second=counts.tokens / times.total,
            learned_tokens_per_second=counts.supervised / times.total,
            samples=counts.samples,
            time=times.total,
            data_time=times.data,
            vision_time=times.vision,
            llm_time=times.llm,
            optimizer_time=times.optimizer,
            data_time_share=times.data / times.total,
            tflops=tflops,
            memory_mib=peak_memory_mib(runner.strategy.device),
        )
        if self._peak is not None:
            scalars['mfu'] = tflops / self._peak
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
        done = runner.iter + 1
        per_step = (time.perf_counter() - self._started) / (done - self._first)  # saving and answers included
        runner.message_hub.update_info('eta', per_step * (runner.max_iters - done))
