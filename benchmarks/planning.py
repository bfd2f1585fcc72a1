"""How long planning takes, and how much memory, cold and from the cache.

python benchmarks/planning.py [--rows 1000 10000 100000 1000000]

Rows are LLaVA-style json lines of one to three questions with answers of log-normal length, each with one image out of
a pool of 2,000 JPEG files of common sizes. The model is a tiny Qwen2.5-VL, of which planning uses the tokenizer and the
arithmetic of the image processor. Every number of rows is measured in two processes of its own, the first without a
stored plan, the second with it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import describe_machine
from PIL import Image

IMAGES = 2_000
SIZES = ((640, 480), (480, 640), (500, 375), (640, 427), (427, 640), (612, 612), (1024, 683), (336, 336))
WORDS = 'the a red small dog cat man woman street table photo near left right of on under holding two people'.split()
EVERY = 0.5  # seconds between two looks at the memory; a look takes some milliseconds of every process
NOTES = """
Seconds are those of `SupervisedDataset(...)` alone: process start, imports and the processor are not in them. Memory is
anonymous memory of the whole process tree (`Pss_Anon` of `/proc/PID/smaps_rollup`, in which a page that several
processes share counts once), sampled twice a second: the highest sum less that of the parent before the data set was
made, when torch, transformers and the processor were loaded. Files mapped into memory and the page cache are not in it.
In brackets: the same with `RssAnon` of `/proc/PID/status`, in which every process counts all it shares.
"""


# ---- the data


def write_images(folder: Path) -> None:
    """The pool: noise of few values, so that files have the size of photos and take no hour to write."""
    folder.mkdir()
    rng = random.Random(0)
    noise = Image.frombytes('L', (64, 64), rng.randbytes(64 * 64)).convert('RGB')
    for i in range(IMAGES):
        noise.resize(SIZES[i % len(SIZES)]).save(folder / f'{i:05}.jpg', quality=70)


def write_rows(path: Path, count: int) -> None:
    """One object a line."""
    rng = random.Random(count)
    with path.open('w', encoding='utf-8') as file:
        for i in range(count):
            turns = []
            for turn in range(rng.choice((1, 1, 2, 3))):
                question = ' '.join(rng.choices(WORDS, k=rng.randint(4, 12))) + '?'
                answer = ' '.join(rng.choices(WORDS, k=2 + int(rng.lognormvariate(3.2, 0.9))))
                mark = '<image>\n' if turn == 0 else ''
                turns += [{'from': 'human', 'value': mark + question}, {'from': 'gpt', 'value': answer}]
            row = {'id': str(i), 'image': f'{rng.randrange(IMAGES):05}.jpg', 'conversations': turns}
            file.write(json.dumps(row) + '\n')


# ---- memory


def tree(root: int) -> list[int]:
    """The process and all below it."""
    found, at = [root], 0
    while at < len(found):
        for thread in Path(f'/proc/{found[at]}/task').glob('*/children'):
            found += [int(child) for child in read(thread).split()]
        at += 1
    return found


def read(path: Path) -> str:
    """'' where the process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ''


def anonymous(root: int) -> tuple[int, int]:
    """KiB of the tree: shared pages once, and shared pages in every process."""
    once = every = 0
    for process in tree(root):
        for line in read(Path(f'/proc/{process}/smaps_rollup')).splitlines():
            once += int(line.split()[1]) if line.startswith('Pss_Anon:') else 0
        for line in read(Path(f'/proc/{process}/status')).splitlines():
            every += int(line.split()[1]) if line.startswith('RssAnon:') else 0
    return once, every


class Peak(threading.Thread):
    """The most anonymous memory while it runs, above what there was at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous(os.getpid())
        self.done = threading.Event()

    def run(self) -> None:
        """Sample until ``done``."""
        while not self.done.wait(EVERY):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        now = anonymous(os.getpid())
        self.most = (max(self.most[0], now[0]), max(self.most[1], now[1]))

    def above(self) -> list[float]:
        """MiB."""
        return [(most - before) / 1024 for most, before in zip(self.most, self.before, strict=True)]


# ---- one measurement, in a process of its own


def measure(rows: Path, images: Path, model: Path, cache: Path) -> dict[str, object]:
    """Make the data set once."""
    from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows  # noqa: PLC0415

    processor = Processor(str(model))
    processor.stop_token_ids()  # the first use of the tokenizer loads more
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    dataset = SupervisedDataset(
        dict(type=load_rows, path=str(rows)),
        processor=processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(images),
        max_length=65536,  # no row is left out
        cache_dir=str(cache),
    )
    seconds = time.perf_counter() - started
    peak.sample()
    peak.done.set()
    return dict(seconds=seconds, memory=peak.above(), samples=len(dataset), tokens=int(dataset.lengths.sum()))


def measured(*paths: Path) -> dict[str, object]:
    """What ``measure`` says in a new process."""
    command = [sys.executable, __file__, '--measure', *map(str, paths)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_table(counts: list[int], folder: Path) -> None:
    """A line per number of rows and state of the cache."""
    from vlmtune.testing import write_tiny_model  # noqa: PLC0415

    model, images, cache = folder / 'model', folder / 'images', folder / 'plans'
    write_tiny_model('qwen2_5_vl', model)
    write_images(images)
    print('| rows | tokens | plan | seconds | rows/s | memory, MiB |\n|---|---|---|---|---|---|')
    for count in counts:
        rows = folder / f'{count}.jsonl'
        write_rows(rows, count)
        for name in ('cold', 'warm'):
            result = measured(rows, images, model, cache)
            seconds, (once, every) = result['seconds'], result['memory']
            if result['samples'] != count:
                raise RuntimeError(f'{result["samples"]} of {count} rows were planned')
            speed, memory = f'{seconds:.2f} | {count / seconds:,.0f}', f'{once:.0f} ({every:.0f})'
            print(f'| {count:,} | {result["tokens"]:,} | {name} | {speed} | {memory} |', flush=True)
        rows.unlink()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, nargs='+', default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument('--measure', type=Path, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(f'# Planning\n\nmachine: {describe_machine()}\n')
    with tempfile.TemporaryDirectory() as folder:
        print_table(options.rows, Path(folder))
    print(NOTES)


if __name__ == '__main__':
    main()
