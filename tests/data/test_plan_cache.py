"""A plan is used again when nothing changed that it depends on, and never when something did."""

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.utils.errors import DataError


def row(number, *, image=None, answer='A square.'):
    turns = [{'from': 'human', 'value': ('<image>\n' if image else '') + f'What is it, {number}?'}]
    turns.append({'from': 'gpt', 'value': answer})
    return {'conversations': turns} | ({} if image is None else {'image': image})


@pytest.fixture
def world(tmp_path, processor):
    """Rows on disk, images, and ``build(**changes)``: a data set over them, planned in this process."""

    class World:
        cache = tmp_path / 'plans'
        images = tmp_path / 'images'
        rows = tmp_path / 'train.jsonl'

        def write(self, *rows):
            self.rows.write_text(''.join(json.dumps(r) + '\n' for r in rows))

        def build(self, model='llava', **changes):
            template = 'vicuna' if model == 'llava' else None
            settings = dict(
                rows=dict(type=load_rows, path=str(self.rows)),
                dataset_map_fn=dict(type=llava_map_fn),
                template_map_fn=dict(type=chat_template_map_fn),
                image_folder=str(self.images),
                max_length=64,
                cache_dir=str(self.cache),
                planning_workers=0,
            )
            if 'processor' not in changes:
                settings['processor'] = processor(model, prompt_template=template)
            return SupervisedDataset(**{**settings, **changes})

    world = World()
    world.images.mkdir()
    for name, size in (('a.png', (60, 90)), ('b.png', (30, 30))):
        Image.new('RGB', size).save(world.images / name)
    world.write(row(0, image='a.png'), row(1, image='b.png'), row(2), row(3, image='a.png'))
    return world


@pytest.fixture
def outcome(caplog):
    """``outcome()``: 'hit', or why rows were planned, of what was built since the last call."""
    caplog.set_level('INFO')

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == 'vlmtune.data.plan_cache']
        caplog.clear()
        if any('nothing changed' in line for line in lines):
            return 'hit'
        (reason,) = [line for line in lines if 'planning' in line]
        return reason.partition(': ')[2].partition('; planning')[0]

    return said


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


MISSES = {
    'max_length': (dict(max_length=63), 'the last one differs in max_length (64 -> 63)'),
    'overlong': (dict(overlong='truncate_turns'), 'the last one differs in overlong (drop -> truncate_turns)'),
    'loss': (
        dict(template_map_fn=dict(type=chat_template_map_fn, loss='last_turn')),
        'the last one differs in template_map_fn',
    ),
    'model': (dict(model='qwen2_vl'), 'the last one differs in chat_template, image_processor, joint_settings, '),
}
HITS = {
    'on_bad_sample': dict(on_bad_sample='skip'),
    'budget': dict(bad_sample_budget=0.5),
    'workers': dict(planning_workers=2),
}


@pytest.mark.parametrize('name', MISSES)
def test_settings_that_matter(name, world, outcome):
    changes, reason = MISSES[name]
    world.build()
    outcome()
    world.build(**changes)
    assert outcome().startswith(reason)
    world.build()
    assert outcome() == 'hit', 'the first plan is kept'


@pytest.mark.parametrize('name', HITS)
def test_settings_that_do_not(name, world, outcome):
    world.build()
    outcome()
    world.build(**HITS[name])
    assert outcome() == 'hit'


@pytest.mark.parametrize(
    ('settings', 'differs'),
    [
        (dict(prompt_template='chatml'), 'chat_template'),
        (dict(special_tokens=('<answer>',)), 'special_tokens, tokenizer'),
        (dict(image_processor=dict(max_pixels=56 * 56)), 'image_processor'),
    ],
)
def test_the_processor(settings, differs, world, outcome, tiny_model):
    template = 'qwen_vl'
    build = lambda **more: world.build(  # noqa: E731
        processor=Processor(str(tiny_model('qwen2_vl')), **{'prompt_template': template, **more}), on_bad_sample='skip',
        bad_sample_budget=1.0,
    )  # fmt: skip
    build()
    build()
    assert outcome() == 'hit'
    build(**settings)
    assert outcome() == f'the last one differs in {differs}'


def test_the_file_of_rows(world, outcome):
    world.build()
    outcome()
    os.utime(world.rows)
    (world.rows.parent / 'unrelated.jsonl').write_text('{}')
    world.build()
    assert outcome() == 'hit'
    world.write(row(0, image='a.png'), row(1, image='b.png'), row(2), row(4, image='a.png'))  # as many bytes
    world.build()
    assert outcome() == 'the last one differs in rows'


@pytest.mark.parametrize('what', ['touched', 'changed', 'removed'])
def test_images(what, world, outcome):
    world.build()
    outcome()
    if what == 'touched':
        os.utime(world.images / 'b.png', ns=(1, 1))
    elif what == 'changed':
        Image.new('RGB', (90, 10)).save(world.images / 'b.png')
    else:
        (world.images / 'b.png').unlink()
    rebuilt = world.build(on_bad_sample='skip', bad_sample_budget=1.0)
    assert outcome() == 'image b.png has changed since the last one'
    assert len(rebuilt.bad_samples) == (what == 'removed')
    world.build(on_bad_sample='skip', bad_sample_budget=1.0)
    assert outcome() == 'hit'


def test_an_image_that_was_missing_and_is_there_now(world, outcome):
    world.write(row(0), row(1, image='new.png'))
    lenient = dict(on_bad_sample='skip', bad_sample_budget=1.0)
    assert len(world.build(**lenient)) == 1
    with pytest.raises(DataError, match=r'sample 1 \(train.jsonl:2\): image not found'):
        world.build()
    outcome()
    Image.new('RGB', (30, 30)).save(world.images / 'new.png')
    assert len(world.build(**lenient)) == 2
    assert outcome() == 'image new.png has changed since the last one'


def test_an_image_that_was_broken_and_is_mended(world, outcome):
    world.write(row(0), row(1, image='new.png'))
    (world.images / 'new.png').write_bytes(b'no picture')
    lenient = dict(on_bad_sample='skip', bad_sample_budget=1.0)
    world.build(**lenient)
    outcome()
    assert len(world.build(**lenient)) == 1
    assert outcome() == 'hit'
    Image.new('RGB', (30, 30)).save(world.images / 'new.png')
    assert len(world.build(**lenient)) == 2


OWN = """
from vlmtune.data import llava_map_fn
def own_map_fn(row, *, prefix=''):
    return llava_map_fn(row)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own()``: a user's map function, imported anew from its file; ``own.path`` is the file."""
    import importlib.util

    def load():
        spec = importlib.util.spec_from_file_location('own_functions', load.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.own_map_fn

    load.path = tmp_path / 'own_functions.py'
    load.path.write_text(OWN)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    return load


def test_a_function_of_the_users(world, outcome, own):
    world.build(dataset_map_fn=own())
    outcome()
    world.build(dataset_map_fn=own())
    assert outcome() == 'hit'
    world.build(dataset_map_fn=functools.partial(own(), prefix='x'))
    assert outcome() == 'the last one differs in dataset_map_fn'
    own.path.write_text(OWN + '\n# changed\n')
    world.build(dataset_map_fn=own())
    assert outcome() == 'the last one differs in dataset_map_fn'


def test_a_function_that_nothing_tells_from_another_is_not_stored(world, outcome):
    hidden = 3

    def closure(value):
        assert hidden
        return llava_map_fn(value)

    for function in (closure, functools.partial(closure, object())):
        with contextlib.suppress(TypeError):  # the second one cannot be called so
            world.build(dataset_map_fn=function)
        assert outcome() == (
            'not stored, for it depends on a dataset_map_fn that is not a plain function of a file with plain arguments'
        )
    assert not list(world.cache.glob('*'))


def test_rows_in_memory(world, outcome):
    rows = [row(0), row(1)]
    world.build(rows=rows)
    outcome()
    world.build(rows=[row(0), row(1)])
    assert outcome() == 'hit'
    world.build(rows=[row(0), row(2)])
    assert outcome() == 'the last one differs in rows'
    picture = {**row(0, image='x'), 'image': Image.new('RGB', (30, 30))}
    world.build(rows=[picture])
    assert outcome() == 'not stored, for it depends on rows in memory that are not plain data'


def test_pictures_in_the_rows_are_mapped_again_when_they_are_fetched(world, outcome):
    import base64

    data = base64.b64encode((world.images / 'a.png').read_bytes()).decode()
    world.write(row(0), row(1, image=f'data:image/png;base64,{data}'))
    cold = world.build()
    warm = world.build()
    assert outcome() == 'hit'
    assert warm.samples[1].images == cold.samples[1].images
    assert warm.samples[1].images[0].data == (world.images / 'a.png').read_bytes()
    assert len((next(world.cache.glob('*.arrow'))).read_bytes()) < len(data) + 6000
    assert warm[1]['pixel_bytes'].equal(cold[1]['pixel_bytes'])


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


def build_in_turn(world, folder, slow, results):
    dataset = world.build(dataset_map_fn=functools.partial(slow, note=str(folder / 'mapped')))
    results.put(dataset.lengths.tolist())


def slowly(value, *, note):
    with open(note, 'a') as file:
        file.write('x')
    time.sleep(0.05)
    return llava_map_fn(value)


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_of_several_processes_one_plans(world, tmp_path):
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    ranks = [context.Process(target=build_in_turn, args=(world, tmp_path, slowly, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    lengths = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(lengths[0]) == 4
    assert (tmp_path / 'mapped').read_text() == 'x' * 4


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_when_the_planner_dies_the_next_one_plans(world, tmp_path):
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    first = context.Process(target=build_in_turn, args=(world, tmp_path, slowly, results))
    first.start()
    until = time.monotonic() + 30
    while not (tmp_path / 'mapped').exists() and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    first.join(30)
    second = world.build(dataset_map_fn=functools.partial(slowly, note=str(tmp_path / 'mapped')))
    assert len(second) == 4
    assert results.empty()
