"""What the Runner adds to a step: its steps against those of a bare loop over the same batches.

Both train one Qwen2.5-VL of random weights in full with fused AdamW and clipping on the same packs, in turn, each in a
process of its own. The bare loop holds its batches in memory and does nothing but forward, backward, clip and update;
the Runner's step goes from the end of one step to the end of the next, hooks, log, fetching and counting included. The
mark is 2 %. On a GPU by default; where there is none it says so, unless --cpu asks for a small model on the CPU.

python benchmarks/runner_overhead.py [--shape 3b] [--steps 30] [--rounds 3] [--cpu]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_step import write_model
from machine import describe_machine
from mmengine.hooks import Hook

from vlmtune.config import load_config
from vlmtune.engine import Runner
from vlmtune.engine.build import build_data, build_model
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.device import find_device

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import Kind, write_rows  # noqa: E402  (a script's neighbour, not a package)

MARK, WARM_UP = 0.02, 5
ROWS = dict(heights=(448,), widths=(448,), mean=4.0, sigma=0.6, longest=300)
MAX_NORM = 1.0


class Ends(Hook):
    """The time at the end of every step."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """All hooks have run."""
        synchronize()
        self.times.append(time.perf_counter())


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config(workload: Path, steps: int) -> Any:
    """Of both."""
    dtype = 'bfloat16' if torch.cuda.is_available() else 'float32'
    settings = dict(
        workload=str(workload), max_length=2048, max_epochs=None, max_steps=steps, max_norm=MAX_NORM, dtype=dtype,
        dataloader_num_workers=1, lr=1e-5,
    )  # fmt: skip
    return load_config(str(CONTENDERS / 'vlmtune_config.py'), settings)


def run_ours(workload: Path, steps: int) -> list[float]:
    """Ends of the Runner's steps."""
    cfg = config(workload, steps)
    ends = Ends()
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        runner.register_hook(ends)
        runner.train()
    return ends.times


def run_bare(workload: Path, steps: int) -> list[float]:
    """Ends of the bare loop's steps."""
    cfg = config(workload, steps)
    processor, loader = build_data(cfg)
    device, batches = find_device(), []
    while len(batches) < steps:
        loader.batch_sampler.start_epoch(loader.batch_sampler.epoch + bool(batches))  # type: ignore[union-attr]
        batches += list(loader)
    model = build_model(cfg, processor=processor).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    times = []
    for batch in batches[:steps]:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        learned = int((batch['labels'][:, 1:] != IGNORE_INDEX).sum())
        (model(**moved) / learned).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter())
    return times


def measured(kind: str, workload: Path, steps: int) -> list[float]:
    """Seconds of every step behind the first ones, in a process of its own."""
    command = [sys.executable, __file__, '--measure', kind, str(workload), '--steps', str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
    times = json.loads(done.stdout.splitlines()[-1])
    return [end - start for start, end in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]


def compare(shape: str, steps: int, rounds: int) -> None:
    """Print a table and the verdict."""
    steps_of: dict[str, list[float]] = {'bare': [], 'ours': []}
    with tempfile.TemporaryDirectory() as scratch:
        workload = Path(scratch)
        write_model(workload / 'model', shape)
        write_rows(workload, Kind(**ROWS, rows=6 * steps))  # type: ignore[arg-type]
        for _ in range(rounds):
            for kind, seconds in steps_of.items():
                seconds += measured(kind, workload, steps)
    medians = {kind: statistics.median(seconds) for kind, seconds in steps_of.items()}
    print('| loop | steps | median, ms | 10 % to 90 %, ms |\n|---|---|---|---|')
    for kind, name in (('bare', 'bare loop'), ('ours', 'Runner')):
        tenths = statistics.quantiles(steps_of[kind], n=10)
        spread = f'{1000 * tenths[0]:.1f} to {1000 * tenths[-1]:.1f}'
        print(f'| {name} | {len(steps_of[kind])} | {1000 * medians[kind]:.1f} | {spread} |')
    added = medians['ours'] / medians['bare'] - 1
    print(f'\nThe Runner adds {added:.1%} to a step; the mark is {MARK:.0%}: {"met" if added <= MARK else "missed"}.')


def main() -> None:
    """Print a table, or that there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', default='3b', help='of gpu_step.py: tiny, 3b, 7b')
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--cpu', action='store_true', help='the tiny shape, on the CPU')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, workload = options.measure
        print('\n' + json.dumps((run_bare if kind == 'bare' else run_ours)(Path(workload), options.steps)))
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(f'# What the Runner adds to a step\n\nmachine: {describe_machine()}; {gpu or "no GPU"}\n')
    if gpu is None and not options.cpu:
        print(f'No GPU was at hand: not run. The mark is {MARK:.0%}.')
        return
    compare('tiny' if gpu is None else options.shape, options.steps, options.rounds)


if __name__ == '__main__':
    main()
