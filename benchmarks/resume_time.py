"""From the start of a resume to the first step, at 10 %, 50 % and 90 % of an epoch, and a fresh start.

Rows are those of mixed_lengths.py's findings, on a pool of pictures, in packs of 2,048 tokens. Every run is a process
of its own with a stored plan. The checkpoints are those of one trained step, saved as if it had been the one at that
place: what is timed does not ask for the steps between. A replay, as mmengine resumes, would fetch every batch before
that place; it is estimated from the time that the first twenty take.

python benchmarks/resume_time.py [--rows 20000]
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from machine import describe_machine
from mmengine.hooks import Hook

from vlmtune.config import load_config
from vlmtune.engine import Runner

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import KINDS, write_rows, write_workload  # noqa: E402  (a script's neighbour, not a package)

PLACES = (0.1, 0.5, 0.9)  # of the epoch
PICTURES = 160
FETCHED = 20  # batches
NOTES = """
"Built" is the time for data set, model and runner, before anything is resumed. "First batch" and "first step" are
counted from the end of that; a resume checks hashes and reads weights and moments before the first batch. Imports are
in none of them.
"""


class Watch(Hook):
    """Seconds to the first batch and to the end of the first step."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: list[float] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The first batch is there."""
        self.seconds.append(time.perf_counter() - self.started)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The weights are updated."""
        self.seconds.append(time.perf_counter() - self.started)


class EndedEarly(Exception):
    """One step is enough."""


class Stop(Hook):
    """Saves at every place, if a folder is given, and ends the run behind its first step."""

    priority = 'VERY_LOW'

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The first step is done."""
        loop, steps = runner.train_loop, len(runner.train_dataloader)
        for place in PLACES if self.folder else ():
            loop._iter = round(place * steps) - 1
            loop.sampler.consumed = round(place * steps) * loop.sampler.packs_per_step
            runner.save_checkpoint(str(self.folder), f'iter_{loop.iter + 1}.pth')
        raise EndedEarly


def measure(workload: Path, resume: str | None, folder: Path | None) -> dict[str, Any]:
    """One run."""
    settings = dict(workload=str(workload), plan_cache_dir=str(workload / 'plans'), max_epochs=1)
    cfg = load_config(str(CONTENDERS / 'vlmtune_config.py'), settings)
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir, cfg.log_level, cfg.resume = work_dir, 'WARNING', resume or False
        started = time.perf_counter()
        runner = Runner.from_cfg(cfg)
        built = time.perf_counter() - started
        watch = Watch()
        runner.register_hook(watch)
        runner.register_hook(Stop(folder))
        with contextlib.suppress(EndedEarly):
            runner.train()
        loader = runner.train_dataloader
        loader.batch_sampler.start_epoch(0)
        started = time.perf_counter()
        fetched = len(list(islice(loader, FETCHED)))
        each = (time.perf_counter() - started) / fetched
    return dict(built=built, batch=watch.seconds[0], step=watch.seconds[1], steps=len(loader), each=each)


def measured(workload: Path, *, resume: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """What ``measure`` says in a new process."""
    command = [sys.executable, __file__, '--measure', str(workload), str(resume or ''), str(folder or '')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def write_data(workload: Path, count: int) -> None:
    """``count`` rows over PICTURES pictures."""
    write_workload(workload, 'findings')
    write_rows(workload, replace(KINDS['findings'], rows=PICTURES))
    lines = (workload / 'rows.jsonl').read_text().splitlines()
    rows = (json.loads(lines[number % PICTURES]) | {'id': str(number)} for number in range(count))
    (workload / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=20_000)
    parser.add_argument('--measure', nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        workload, resume, folder = options.measure
        print(json.dumps(measure(Path(workload), resume or None, Path(folder) if folder else None)))
        return
    print(f'# Resuming\n\nmachine: {describe_machine()}\n')
    with tempfile.TemporaryDirectory() as scratch:
        workload, saved = Path(scratch, 'workload'), Path(scratch, 'saved')
        write_data(workload, options.rows)
        first = measured(workload, folder=saved)  # also stores the plan
        print(f'{options.rows:,} rows, {first["steps"]:,} steps an epoch\n')
        print('| start | built, s | first batch, s | first step, s | a replay would add, s |\n|---|---|---|---|---|')
        for place in (0.0, *PLACES):
            at = round(place * first['steps'])
            run = measured(workload, resume=saved / f'iter_{at}.pth' if at else None)
            name = f'resumed at {place:.0%}, step {at:,}' if at else 'fresh'
            times = ' | '.join(f'{run[key]:.2f}' for key in ('built', 'batch', 'step'))
            print(f'| {name} | {times} | {at * first["each"]:.0f} |', flush=True)
    print(NOTES)


if __name__ == '__main__':
    main()
