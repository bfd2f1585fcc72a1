"""A run ends when its validations no longer get better."""

import json

import pytest

from vlmtune.utils.errors import ConfigError

STOPPING = 'custom_hooks += [dict(type=EarlyStoppingHook, monitor="val/loss", patience={patience}, min_delta=0.5)]\n'


def told(*losses):
    given = ', '.join(f'at_{step}={loss}' for step, loss in enumerate(losses, start=1))
    return f'from validation_hooks import Told\ncustom_hooks += [dict(type=Told, {given})]\n'


def records(work_dir):
    return [json.loads(line) for line in (work_dir / 'validation.jsonl').read_text().splitlines()]


def saved(work_dir):
    return sorted(int(path.stem[5:]) for path in work_dir.glob('iter_*.pth'))


def test_a_run_stops_when_it_no_longer_gets_better(validated, caplog):
    """It is saved where it stops; a resumed run has stopped, unless it is given more patience."""
    settings = dict(max_steps=6, max_epochs=None, val_interval=1)
    scores = told(3, 2, 1.8, 1.7, 1, 1)
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = validated('stopped', more=scores + STOPPING.format(patience=2), **settings)
    assert saved(work_dir) == [4]
    assert 'stopping early after 2 validations: val/loss was 2.0000 at step 2' in caplog.text
    validated('stopped', more=scores + STOPPING.format(patience=2), resume=True, **settings)
    assert saved(work_dir) == [4]
    validated('stopped', more=scores + STOPPING.format(patience=3), resume=True, **settings)
    assert saved(work_dir) == [4, 6]
    assert [row['iteration'] for row in records(work_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('monitor="val/cor"', r"EarlyStoppingHook.monitor: no score is called 'val/cor', did you mean 'val/cer'"),
        ('monitor="val/cer", patience=0', 'EarlyStoppingHook: patience=0, min_delta=0.0; expected at least 1 and 0'),
        ('monitor="val/cer", rule="more"', "rule='more' is unknown; expected 'greater', 'less' or None"),
    ],
)
def test_mistakes_in_stopping_early(given, message, validated):
    with pytest.raises(ConfigError, match=message):
        validated('wrong', more=f'custom_hooks += [dict(type=EarlyStoppingHook, {given})]\n', data_path='/no/data.json')


def test_it_keeps_its_own_class_and_priority_when_it_is_named_by_a_text(validated):
    """mmengine has one of that name, which nothing here calls."""
    settings = dict(max_steps=3, max_epochs=None, val_interval=1)
    stopping = 'custom_hooks += [dict(type="EarlyStoppingHook", monitor="val/loss", patience=1, priority="LOW")]\n'
    assert saved(validated('stopped', more=told(1, 2, 3) + stopping, **settings)) == [2]


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (
            'custom_hooks += [dict(type="mmengine.hooks.EarlyStoppingHook", monitor="loss")]\n',
            r"custom_hooks.\d.type is mmengine's .* write from vlmtune.engine import EarlyStoppingHook",
        ),
        (
            'default_hooks.checkpoint = dict(type="mmengine.hooks.CheckpointHook")\n',
            "default_hooks.checkpoint.type is mmengine's .* write from vlmtune.engine import CheckpointHook",
        ),
    ],
)
def test_hooks_of_mmengine_that_cannot_work(more, message, validated):
    with pytest.raises(ConfigError, match=message):
        validated('wrong', more=more, data_path='/no/data.json')
