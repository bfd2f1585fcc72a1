"""Runs that are killed, and disks that fail.

The LLaVA recipe over a tiny model: six steps, a checkpoint every second one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from vlmtune.testing.warm_ranks import Ended, WarmRanks

RECIPE = 'llava_1_5_7b_lora_mix665k'
STEPS = 6
SETTINGS: dict[str, Any] = dict(
    tune=dict(vision_encoder='frozen', projector='full', llm='lora'),
    lora_r=4, lora_dropout=0.1, dtype='float32', gradient_checkpointing=False, max_length=96,
    dataloader_num_workers=0, max_epochs=1, lr=1e-2, seed=7, save_steps=2, save_total_limit=2,
    evaluation_inputs=[], evaluation_images=None, plan_cache_dir=None,
)  # fmt: skip


@pytest.fixture(scope='session')
def spread(warm_ranks, tmp_path_factory) -> Iterator[Callable[..., list[str]]]:
    """``spread(task, items)``: ``task(item, folder, ranks)`` for every item, two at a time; returns what went wrong."""
    parents = [warm_ranks, WarmRanks(tmp_path_factory.mktemp('ranks'))]
    free: SimpleQueue[WarmRanks] = SimpleQueue()
    for parent in parents:
        free.put(parent)

    def run(task: Callable[[Any, Path, WarmRanks], None], items: Iterable[Any]) -> list[str]:
        def one(item: Any) -> str | None:
            folder, parent = tmp_path_factory.mktemp('spread'), free.get()
            try:
                task(item, folder, parent)
            except AssertionError as error:
                return f'{item}: {error}'
            finally:
                free.put(parent)
                shutil.rmtree(folder)
            return None

        with ThreadPoolExecutor(len(parents)) as pool:
            return [failure for failure in pool.map(one, items) if failure is not None]

    yield run
    parents[1].close()


@pytest.fixture(scope='session')
def overrides(tiny_model, tiny_data) -> Callable[[int], dict[str, Any]]:
    """``overrides(2)``: what makes the recipe tiny; a step is two packs, whatever the number of ranks."""
    data = tiny_data('llava', rows=21)
    paths = dict(
        pretrained_model_name_or_path=str(tiny_model('llava')), data_path=str(data.data_path),
        image_folder=str(data.image_folder),
    )  # fmt: skip

    def settings(world_size: int) -> dict[str, Any]:
        return {**SETTINGS, **paths, 'accumulative_counts': 2 // world_size, 'default_hooks.progress': None}

    return settings


@pytest.fixture(scope='session')
def go(warm_ranks, overrides) -> Callable[..., Ended]:
    """``go(2, work_dir, faults=..., resume=True)``: a run to its end, or to what the faults make of it."""

    def train(world_size: int, work_dir: Path, *, ranks: WarmRanks = warm_ranks, **options: Any) -> Ended:
        return ranks.run(world_size, config=RECIPE, work_dir=work_dir, overrides=overrides(world_size), **options)

    return train


@pytest.fixture(scope='session')
def whole(go, tmp_path_factory) -> Callable[[int], Path]:
    """``whole(2)``: the work dir of a run of two ranks that nothing disturbed; ``points_R.txt`` lists where it came."""
    done: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in done:
            work_dir = done[world_size] = tmp_path_factory.mktemp(f'whole{world_size}')
            ended = go(world_size, work_dir, faults=dict(journal=str(work_dir)))
            assert ended.codes == [0] * world_size, ended.said
        return done[world_size]

    return run


@pytest.fixture(scope='session')
def half(go, whole, tmp_path_factory) -> Callable[[Path], Path]:
    """``half(path)``: a work dir as a run that was killed behind step 4 leaves it; iter_2 and iter_4 are whole."""
    made = tmp_path_factory.mktemp('half') / 'run'
    points = journal(whole(1), 0)
    last = max(i for i, kind in enumerate(points) if kind == 'optimizer_step')
    ended = go(1, made, faults=dict(journal=str(made.parent), at=last, fault='kill'))
    assert ended.codes == [-9]
    assert {path.name for path in made.glob('iter_*')} == {'iter_2.pth', 'iter_4.pth'}

    def copy(path: Path) -> Path:
        shutil.copytree(made, path)
        return path

    return copy


def journal(folder: Path, rank: int) -> list[str]:
    """The points that a rank came to."""
    return (folder / f'points_{rank}.txt').read_text().split()


def end_of(work_dir: Path) -> dict[str, Any]:
    """The last checkpoint: the hashes of weights, optimizer and generators, and the loss of every step."""
    path = work_dir / f'iter_{STEPS}.pth'
    files = json.loads((path / 'manifest.json').read_text())['files']
    exact = {name: entry['sha256'] for name, entry in files.items() if name.endswith('.safetensors') or 'rng_' in name}
    assert len(exact) >= 3, exact
    trainer = json.loads((path / 'trainer.json').read_text())
    return dict(exact, losses=trainer['messages']['train/loss'], sampler=trainer['sampler'])


@pytest.fixture(scope='session')
def check_end(whole) -> Callable[[Path, int], None]:
    """``check_end(work_dir, 2)``: it ended as the undisturbed run did, bit for bit, and left nothing half written."""

    def check(work_dir: Path, world_size: int) -> None:
        assert end_of(work_dir) == end_of(whole(world_size))
        left = sorted(path.name for path in work_dir.glob('iter_*'))
        assert left == ['iter_4.pth', 'iter_6.pth']
        assert (work_dir / 'last_checkpoint').read_text() == 'iter_6.pth\n'

    return check


@pytest.fixture(scope='session')
def points() -> Callable[[Path, int], list[str]]:
    """``points(work_dir, rank)``: what a rank came to."""
    return journal


@pytest.fixture
def run_env() -> dict[str, str]:
    """The environment of a command."""
    return {**os.environ, 'OMP_NUM_THREADS': '1'}
