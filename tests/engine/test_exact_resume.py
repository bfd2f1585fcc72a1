"""An interrupted run ends with the bits of one that was not: one process, DDP and ZeRO-2.

Dropout, augmentation and four micro-batches a step; the interruption comes in the middle of an epoch. Compared is what
checkpoints and logs hold, to the bit.
"""

import itertools
import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

SETTINGS = dict(accumulative_counts=4, save_steps=2, lora_dropout=0.1)
AUGMENTED = """
from vlmtune.data import color_jitter, jpeg_compression
train_dataloader['dataset']['image_transform'] = [
    dict(type=color_jitter, brightness=0.3, hue=0.1), dict(type=jpeg_compression)]
"""
CLOCKS = ('time', 'per_second', 'tflops', 'memory', 'mfu', 'data_wait')
STOPPED = 2  # the step after which a run is killed: the middle of its first epoch


@pytest.fixture(scope='module')
def recipe(write_recipe, tiny_data, tmp_path_factory):
    """Of 33 rows: 9 steps an epoch in one process without packing, 3 in two processes with it."""
    data = tiny_data('llava', rows=33)
    path = write_recipe(tmp_path_factory.mktemp('exact') / 'recipe.py', data=data.data_path, images=data.image_folder)
    path.write_text(path.read_text() + AUGMENTED)
    return path


@pytest.fixture(scope='module')
def whole(train_in_ranks, recipe, tmp_path_factory):
    """``whole(2, 'zero2', seed=7, ...)``: the work dir of a run that nothing interrupts; made once."""
    done = {}

    def go(world_size, deepspeed=None, **settings):
        key = repr((world_size, deepspeed, settings))
        if key not in done:
            done[key] = tmp_path_factory.mktemp('whole')
            train(train_in_ranks, recipe, done[key], world_size, deepspeed, **settings)
        return done[key]

    return go


def train(train_in_ranks, recipe, work_dir, world_size, deepspeed, *, resume=False, **settings):
    overrides = {**SETTINGS, **settings}
    train_in_ranks(world_size, recipe, work_dir=work_dir, deepspeed=deepspeed, resume=resume, overrides=overrides)


def checkpoints(work_dir):
    """By step."""
    return {int(path.stem.removeprefix('iter_')): path for path in sorted(work_dir.glob('iter_*.pth'))}


def held(checkpoint):
    """All that a checkpoint holds, but for clocks and the hashes of its files."""
    content = {}
    for path in sorted(checkpoint.glob('*.safetensors')):
        with safe_open(path, 'pt') as file:
            content[path.name] = dict(tensors=load_file(path), metadata=file.metadata())
    for path in sorted(checkpoint.glob('*.json')):
        content[path.name] = json.loads(path.read_text())
    content.pop('manifest.json')
    messages = content['trainer.json'].pop('messages')
    content['messages'] = {name: value for name, value in messages.items() if not is_clock(name)}
    assert {'model.safetensors', 'rng_0.json', 'optimizer_0.safetensors'} <= content.keys()
    assert 'train/loss' in content['messages']
    return content


def is_clock(name):
    return any(clock in name for clock in CLOCKS)


def logged(work_dir):
    """What metrics.jsonl of the newest run says of every step, but for clocks."""
    newest = max(work_dir.glob('*/metrics.jsonl'), key=lambda path: path.stat().st_mtime_ns)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return {line['step']: {k: v for k, v in line.items() if not is_clock(k)} for line in lines}


def interrupt(done, path):
    """A work dir as a run leaves it that is killed behind step STOPPED."""
    kept = checkpoints(done)[STOPPED]
    shutil.copytree(kept, path / kept.name)
    return path


IN_SHORT = ('one-0-packed', 'one-2-padded', 'ddp-0-packed', 'zero2-2-padded')  # the others are slow


def every_setting():
    strategies = {'one': (1, None), 'ddp': (2, None), 'zero2': (2, 'zero2')}
    for name, workers, pack in itertools.product(strategies, (0, 2), (True, False)):
        test_id = f'{name}-{workers}-{"packed" if pack else "padded"}'
        marks = [] if test_id in IN_SHORT else [pytest.mark.slow]
        yield pytest.param(*strategies[name], workers, pack, id=test_id, marks=marks)


@pytest.mark.parametrize(('world_size', 'deepspeed', 'workers', 'pack'), every_setting())
def test_an_interrupted_run_ends_with_the_same_bits(
    world_size, deepspeed, workers, pack, whole, train_in_ranks, recipe, differences, tmp_path
):
    settings = dict(dataloader_num_workers=workers, pack_to_max_length=pack)
    done = whole(world_size, deepspeed, **settings)
    last = max(checkpoints(done))
    expected, before = (held(checkpoints(done)[step]) for step in (last, STOPPED))
    assert before['trainer.json']['sampler']['epoch'] == 0
    assert last > STOPPED + 3, 'the interruption is in the first of two epochs'
    work_dir = interrupt(done, tmp_path / 'killed')
    train(train_in_ranks, recipe, work_dir, world_size, deepspeed, resume=True, **settings)
    assert differences(held(checkpoints(work_dir)[last]), expected) == []
    steps = logged(done)
    assert list(steps) == list(range(1, last + 1))
    assert differences(logged(work_dir), {step: steps[step] for step in range(STOPPED + 1, last + 1)}) == []
    for name in (name for name in expected if name.endswith('.safetensors')):
        tensors, earlier = expected[name]['tensors'], before[name]['tensors']
        moved = [key for key in tensors if not tensors[key].equal(earlier[key])]
        assert len(moved) == len(tensors), f'{name}: every tensor went on after the interruption'


def test_another_seed_is_seen(whole, differences):
    """What the test above compares differs in weights, moments, losses and generators where the seed does."""
    settings = dict(dataloader_num_workers=0, pack_to_max_length=True)
    runs = [whole(2, **settings), whole(2, **settings, seed=8)]
    ends = [held(checkpoints(path)[max(checkpoints(path))]) for path in runs]
    for name in (*(name for name in ends[0] if name.endswith('.safetensors')), 'rng_0.json', 'rng_1.json'):
        assert differences(ends[0][name], ends[1][name]), name
    losses = [[step['loss'] for step in logged(path).values()] for path in runs]
    assert all(a != b for a, b in zip(*losses, strict=True))
