"""A plan is used again; one that is broken, or is being made elsewhere, is told and waited for."""

import functools
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import until
from vlmtune.data import llava_map_fn
from vlmtune.utils.errors import DataError


def test_the_second_time_nothing_is_planned(world, outcome):
    cold = world.build()
    assert outcome() == 'the first one'
    warm = world.build()
    assert outcome() == 'hit'
    assert warm.lengths.tolist() == cold.lengths.tolist()
    for a, b in zip(cold.samples, warm.samples, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.labels, b.labels)
        assert (a.images, a.image_sizes, a.patches) == (b.images, b.image_sizes, b.patches)
    assert warm.rows._places is None, 'the rows were looked for'
    assert warm.where(1) == 'train.jsonl:2'


# ---- files that are not as they were written


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'no table', 'no json', 'other json'])
def test_a_broken_plan_is_told_and_made_again(damage, world, outcome, caplog):
    expected = world.build().lengths.tolist()
    outcome()
    table, info = next(world.cache.glob('*.arrow')), next(world.cache.glob('*.json'))
    data = table.read_bytes()
    if damage == 'cut':
        table.write_bytes(data[: len(data) // 2])
    elif damage == 'flipped':
        table.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    elif damage == 'empty':
        table.write_bytes(b'')
    elif damage == 'no table':
        table.unlink()
    else:
        info.write_text('{' if damage == 'no json' else '[]')
    assert world.build().lengths.tolist() == expected
    assert f'the stored plan {table} is broken' in caplog.text
    assert outcome() == 'the stored one is broken'
    world.build()
    assert outcome() == 'hit'


def test_a_folder_that_cannot_be_written(world, outcome, caplog):
    world.cache.write_text('a file')
    assert len(world.build()) == 4
    assert f'plans cannot be stored in {world.cache} (' in caplog.text
    assert outcome() == 'not stored'


def test_few_plans_of_one_file_are_kept(world):
    for length in range(64, 72):
        world.build(max_length=length)
    assert len(list(world.cache.glob('*.arrow'))) == len(list(world.cache.glob('*.json'))) == 4
    assert not list(world.cache.glob('*.new'))


def test_without_a_folder_nothing_is_left(world, tmp_path, monkeypatch):
    import tempfile

    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
    dataset = world.build(cache_dir=None)
    assert not list((tmp_path / 'tmp').iterdir())
    assert len(dataset.samples[0]) > 5
    assert not list((tmp_path / 'tmp').iterdir())
    with pytest.raises(DataError, match='max_length is 8'):
        world.build(cache_dir=None, overlong='error', max_length=8)
    assert not list((tmp_path / 'tmp').iterdir())


# ---- several processes


def build_noting(world, folder):
    return world.build(dataset_map_fn=functools.partial(noting, note=str(folder / 'mapped')))


def build_in_turn(world, folder, results):
    (folder / f'begun_{os.getpid()}').touch()
    results.put(build_noting(world, folder).lengths.tolist())


def noting(value, *, note):
    with open(note, 'a') as file:
        file.write('x')
    until(lambda: not Path(note).with_name('hold').exists())
    return llava_map_fn(value)


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_of_several_processes_one_plans(world, tmp_path):
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    ranks = [context.Process(target=build_in_turn, args=(world, tmp_path, results)) for _ in range(3)]
    (tmp_path / 'hold').touch()
    for rank in ranks:
        rank.start()
    until(lambda: (tmp_path / 'mapped').exists() and len(list(tmp_path.glob('begun_*'))) == 3)
    (tmp_path / 'hold').unlink()
    lengths = [results.get(timeout=600) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(lengths[0]) == 4
    assert (tmp_path / 'mapped').read_text() == 'x' * 4


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_when_the_planner_dies_the_next_one_plans(world, tmp_path):
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    first = context.Process(target=build_in_turn, args=(world, tmp_path, results))
    (tmp_path / 'hold').touch()
    first.start()
    until((tmp_path / 'mapped').exists)
    first.kill()
    first.join(60)
    (tmp_path / 'hold').unlink()
    assert len(build_noting(world, tmp_path)) == 4
    assert results.empty()
