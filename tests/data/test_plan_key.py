"""A plan is made again when something changed that it depends on, and it says what."""

import contextlib
import functools
import os
import sys

import pytest
from PIL import Image

from tests.data.plans import row
from vlmtune.data import Processor, chat_template_map_fn, llava_map_fn
from vlmtune.utils.errors import DataError

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

    def build(**more):
        processor = Processor(str(tiny_model('qwen2_vl')), **{'prompt_template': template, **more})
        world.build(processor=processor, on_bad_sample='skip', bad_sample_budget=1.0)

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
