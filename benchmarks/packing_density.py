"""How full packs are and how long planning them takes, on lengths as LLaVA's 665,000 instructions have them.

python benchmarks/packing_density.py [--samples 665000]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from machine import describe_machine

from vlmtune.data.packing import WINDOW, Plan, plan_batches, plan_packs

SAMPLES = 665_000
MAX_LENGTH = 4096  # tokens, of a sample and of a pack
BATCH = 8  # rows, where samples are padded instead
WINDOWS = (512, 2048, WINDOW, 65_536)
MAX_PATCHES = (12_288, 16_384)
DISTRIBUTION = """\
{samples:,} samples, seed 0. Text: log-normal, median 180 tokens, sigma 0.9. An image in 75 % of the samples: 576
tokens, or as many as its size asks for, log-normal, median 500, sigma 0.6, between 64 and 2,560; 4 vision patches to
a token. Samples are cut at max_length = {max_length:,}. Mean length: {means}."""


def draw_sizes(images: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """int64[N] tokens and int64[N] vision patches of every sample; ``images`` is '576 each' or 'dynamic'."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(np.log(180), 0.9, samples)
    image = (
        np.full(samples, 576) if images == '576 each' else np.clip(rng.lognormal(np.log(500), 0.6, samples), 64, 2560)
    )
    image = np.where(rng.random(samples) < 0.75, image, 0).astype(np.int64)
    return np.clip(text + image, 16, MAX_LENGTH).astype(np.int64), 4 * image


def first_fit(lengths: np.ndarray, *, open_packs: int) -> Plan:
    """Samples in shuffled order, each into the first of the latest ``open_packs`` packs that has room."""
    packs: Plan = []
    left: list[int] = []
    for index in np.random.default_rng(0).permutation(len(lengths)).tolist():
        length = int(lengths[index])
        start = max(0, len(packs) - open_packs)
        at = next((at for at in range(start, len(packs)) if left[at] >= length), len(packs))
        if at == len(packs):
            packs.append([])
            left.append(MAX_LENGTH)
        packs[at].append(index)
        left[at] -= length
    return packs


def row(name: str, make: Callable[[], Plan], *, lengths: np.ndarray, padded: bool = False) -> str:
    """One line of the table: rows, the share of their positions that hold tokens, seconds."""
    started = time.perf_counter()
    plan = make()
    seconds = time.perf_counter() - started
    rows = sum(map(len, plan)) if padded else len(plan)
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in plan) if padded else rows * MAX_LENGTH
    return f'| {name} | {rows:,} | {lengths.sum() / positions:.4f} | {seconds:.2f} |'


def table(images: str, samples: int) -> list[str]:
    """Every way of making rows, for one kind of images."""
    lengths, patches = draw_sizes(images, samples)
    pack = partial(plan_packs, lengths, max_length=MAX_LENGTH, seed=0, epoch=0)
    batch = partial(plan_batches, lengths, batch_size=BATCH, seed=0, epoch=0)
    lines = [f'\n## Images: {images}\n', '| | rows | density | seconds |\n|---|---|---|---|']
    for window in WINDOWS:
        name = f'best fit, window {window:,}' + (' (the default)' if window == WINDOW else '')
        lines.append(row(name, partial(pack, window=window), lengths=lengths))
    for limit in MAX_PATCHES:
        name = f'best fit, window {WINDOW:,}, at most {limit:,} patches'
        lines.append(row(name, partial(pack, patches=patches, max_patches=limit), lengths=lengths))
    for count in (1, 16):
        name = f'first fit in order, the last {count} packs open' if count > 1 else 'first fit in order, one pack open'
        lines.append(row(name, partial(first_fit, lengths, open_packs=count), lengths=lengths))
    for grouped in (True, False):
        name = f'no packing, padded batches of {BATCH}, ' + ('grouped by length' if grouped else 'not grouped')
        lines.append(row(name, partial(batch, group_by_length=grouped), lengths=lengths, padded=True))
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--samples', type=int, default=SAMPLES)
    options = parser.parse_args()
    kinds = ('576 each', 'dynamic')
    means = ', '.join(f'{draw_sizes(kind, options.samples)[0].mean():.0f} tokens ({kind})' for kind in kinds)
    text = DISTRIBUTION.format(samples=options.samples, max_length=MAX_LENGTH, means=means)
    lines = ['# Packing density\n', f'`python benchmarks/packing_density.py`; machine: {describe_machine()}\n', text]
    lines.append('\nDensity: tokens over positions of all rows. Seconds: planning one epoch, one thread.')
    for kind in kinds:
        lines += table(kind, options.samples)
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
