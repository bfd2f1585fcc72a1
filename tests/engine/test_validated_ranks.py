"""Validation under DDP and ZeRO: the numbers of one process, and training does not notice."""

import json

import pytest

SHORT = dict(max_steps=3, max_epochs=None, lora_dropout=0.0, val_interval=1, at_start=True)


def go(train_in_ranks, path, work_dir, ranks, deepspeed, **settings):
    overrides = dict(SHORT, accumulative_counts=2 // ranks, **settings)
    train_in_ranks(ranks, path, work_dir=work_dir, deepspeed=deepspeed, overrides=overrides)
    return work_dir


def scores(work_dir):
    rows = [json.loads(line) for line in (work_dir / 'validation.jsonl').read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]


@pytest.fixture(scope='module')
def recipe(write_validated):
    return write_validated('ranks')


@pytest.fixture(scope='module')
def alone(train_in_ranks, recipe, tmp_path_factory):
    """What one process finds."""
    return scores(go(train_in_ranks, recipe, tmp_path_factory.mktemp('alone'), 1, None))


SETTINGS = [
    pytest.param(None, id='ddp'),
    pytest.param('zero2', id='zero2', marks=pytest.mark.slow),
    pytest.param('zero3', id='zero3'),
]


@pytest.mark.parametrize('deepspeed', SETTINGS)
def test_two_ranks(deepspeed, recipe, alone, train_in_ranks, contents, differences, tmp_path):
    seen = go(train_in_ranks, recipe, tmp_path / 'seen', 2, deepspeed)
    plain = go(train_in_ranks, recipe, tmp_path / 'plain', 2, deepspeed, val_dataloader=None)
    held = contents(seen / 'iter_3.pth')
    assert [row['iteration'] for row in held['trainer'].pop('validations')] == [0, 1, 2]
    other = contents(plain / 'iter_3.pth')
    assert other['trainer'].pop('validations') == []
    assert differences(held, other) == []
    found = scores(seen)
    assert [row['iteration'] for row in found] == [0, 1, 2, 3]
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.pop('loss') == pytest.approx(theirs['loss'], rel=1e-5)
        assert mine == {name: value for name, value in theirs.items() if name != 'loss'}
    rows = [
        json.loads(line) for line in (seen / 'validation' / 'iter_3' / 'predictions.jsonl').read_text().splitlines()
    ]
    assert [row['index'] for row in rows] == list(range(6))
