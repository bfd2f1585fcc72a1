"""Tokens per second with one rank and with two on this machine: DDP, ZeRO-2, and bare DistributedDataParallel.

Every run learns the rows of mixed_lengths.py's findings in full, in float32, two packs of 1,024 tokens a step over all
ranks, one thread a rank. Two ranks cannot be faster than two cores that share a memory; the bare loop shows how fast
they are. The time is that of the steps, the first two left out; data and saving are in neither.

python benchmarks/ranks_speed.py [--epochs 3] [--rounds 3] [--kind findings]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import KINDS, write_workload  # noqa: E402  (a script's neighbour, not a package)

MAX_LENGTH, MICRO_BATCHES, WARM_UP = 1024, 2, 2
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def call(command: list[str]) -> str:
    """Standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
    return done.stdout


def torchrun(ranks: int) -> list[str]:
    """Starts the rest of a command line in so many processes."""
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks)]


def bare(workload: Path, ranks: int) -> float:
    """Tokens per second of the loop by hand."""
    said = call([*torchrun(ranks), str(CONTENDERS / 'ddp_run.py'), str(workload), str(MAX_LENGTH)])
    result = json.loads(said.splitlines()[-1])
    return result['tokens'] / result['seconds']


def ours(workload: Path, ranks: int, deepspeed: str | None, epochs: int) -> float:
    """Tokens per second of vlmtune's steps."""
    settings = {
        'workload': workload,
        'max_length': MAX_LENGTH,
        'max_epochs': epochs,
        'train_cfg.accumulative_counts': MICRO_BATCHES // ranks,
    }
    with tempfile.TemporaryDirectory() as work_dir:
        command = [
            *torchrun(ranks), '-m', 'vlmtune', 'train', str(CONTENDERS / 'vlmtune_config.py'), '--launcher', 'pytorch',
            '--work-dir', work_dir, *(['--deepspeed', deepspeed] if deepspeed else []),
            '--cfg-options', *(f'{name}={value}' for name, value in settings.items()),
        ]  # fmt: skip
        call(command)
        (log,) = Path(work_dir).glob('*/metrics.jsonl')
        steps = [json.loads(line) for line in log.read_text().splitlines()][WARM_UP:]
    tokens = sum(step['tokens_per_second'] * step['time'] for step in steps)
    return tokens / sum(step['time'] - step['data_time'] for step in steps)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--kind', choices=list(KINDS), default='findings')
    options = parser.parse_args()
    runs = {
        'vlmtune, DDP': lambda workload, ranks: ours(workload, ranks, None, options.epochs),
        'vlmtune, ZeRO-2': lambda workload, ranks: ours(workload, ranks, 'zero2', options.epochs),
        'bare DistributedDataParallel': bare,
    }
    print(f'# One rank and two\n\nmachine: {describe_machine()}; {options.rounds} rounds\n')
    with tempfile.TemporaryDirectory() as scratch:
        workload = Path(scratch)
        write_workload(workload, options.kind)
        seen: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for name, run in runs.items():
                for ranks in (1, 2):
                    seen.setdefault((name, ranks), []).append(run(workload, ranks))
    print('| run | 1 rank, tokens/s | 2 ranks, tokens/s | 2 ranks against 1 |\n|---|---|---|---|')
    for name in runs:
        one, two = (statistics.median(seen[name, ranks]) for ranks in (1, 2))
        print(f'| {name} | {one:,.0f} | {two:,.0f} | {two / one:.2f} |')


if __name__ == '__main__':
    main()
