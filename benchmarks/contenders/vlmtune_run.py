"""vlmtune on the workload, through its own Runner: planning, packing and training from the files on disk.

python benchmarks/contenders/vlmtune_run.py WORKLOAD MAX_LENGTH WORKERS
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import LEARNING_RATE, MAX_NORM, THREADS, answer, resident_mib
from mmengine.hooks import Hook

from vlmtune.config import load_config
from vlmtune.engine import Runner
from vlmtune.engine.build import build_data

CONFIG = Path(__file__).with_name('vlmtune_config.py')


class StepClock(Hook):
    """Seconds between the moment a step has its inputs and its end."""

    priority = 'VERY_LOW'
    seconds = 0.0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The inputs are there."""
        self.started = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The weights are updated."""
        self.seconds += time.perf_counter() - self.started


def main() -> None:
    """Train one epoch and print the figures."""
    directory, max_length, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(THREADS)
    baseline = resident_mib()
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(
            workload=str(directory), max_length=max_length, dataloader_num_workers=workers, lr=LEARNING_RATE,
            max_norm=MAX_NORM,
        )  # fmt: skip
        cfg = load_config(str(CONFIG), settings)
        cfg.work_dir = scratch
        started = time.perf_counter()
        build_data(cfg)  # from_cfg does it again; this one is what is timed, without loading the model
        planning = time.perf_counter() - started
        runner = Runner.from_cfg(cfg)
        clock = StepClock()
        runner.register_hook(clock)
        started = time.perf_counter()
        runner.train()
        training = time.perf_counter() - started
        dataset = runner.train_dataloader.dataset
        answer(
            baseline_mib=baseline, step_seconds=clock.seconds, total_seconds=planning + training, steps=runner.iter,
            samples=len(dataset), tokens=int(dataset.lengths.sum()), supervised=int(dataset.supervised.sum()),
            image_tokens=int(dataset.patches.sum()) // 4, longest=int(dataset.lengths.max()),
        )  # fmt: skip


if __name__ == '__main__':
    main()
