"""What runs wrote is read, resumed and broken as it may be, and never run."""

import json
import re

import pytest

from tests.apps.report.pages import page_of
from vlmtune.apps.report.run_files import image_folders, read_runs, settings_of
from vlmtune.testing.tiny_runs import tiny_prediction, tiny_step, write_lines


def test_a_resumed_run_is_one_run(run):
    """Killed after 60 steps, resumed from 40, ended at 50: 41 to 60 of the first start do not count."""
    write_lines(run / '20260102_000000/metrics.jsonl', [tiny_step(i, loss=77.0) for i in range(41, 51)])
    with (run / 'validation.jsonl').open('a') as file:
        file.write('{"iteration": 60, "cer": 9.0}\n{"iteration": 40, "cer": 8.0}\n')
    with (run / 'evaluate_chat.jsonl').open('a') as file:
        file.write(json.dumps(dict(iteration=40, input='What is it?', images=[], answer='new question')) + '\n')
        for answer in ('anew', 'once more'):
            file.write(json.dumps(dict(iteration=40, input='new', images=[], answer=answer)) + '\n')
    (found,) = read_runs([str(run)])
    assert found.series('loss') == [(i, 6 / i) for i in range(1, 41)] + [(i, 77.0) for i in range(41, 51)]
    assert found.validation_series('cer') == [(20, 0.05), (40, 8.0)]
    answers = [(row['iteration'], row['answer']) for row in found.chats]
    assert answers == [(0, 'answer 0'), (20, 'answer 20'), (40, 'answer 40'), (40, 'new question'), (40, 'once more')]
    assert 'started2 times' in page_of(run).section('overview')


def test_broken_files_are_told_and_left_out(run):
    log = run / '20260101_000000'
    with (log / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 61, "loss": NaN, "lr": "x"}\n[1]\n{"step": "62"}\n{"st')
    (log / 'parts.json').write_text('{')
    (log / 'config.py').write_text('lr = (')
    (run / 'evaluate_chat.jsonl').write_bytes(b'\xff\xfe\n' + b'[' * 100000 + b'\n')
    (found,) = read_runs([str(run)])
    assert [row['step'] for row in found.steps] == list(range(1, 62))
    assert found.series('loss')[-1][0] == found.series('lr')[-1][0] == 60
    page = page_of(run)
    notes = [text for _, _, text in page.all('p', 'trouble')]
    assert notes[:2] == [
        '20260101_000000/metrics.jsonl: 3 lines could not be read',
        'evaluate_chat.jsonl: 2 lines could not be read',
    ]
    assert page.section('parts') is None


@pytest.mark.parametrize('sizes', [5, [5], [[5]], [['a', 'b']], [[None, 3]], {'a': 1}, 'x', [[1, 2, 3]], [[1e999, 1]]])
def test_a_prediction_of_sizes_that_are_none_is_told_and_left_out(tmp_path, sizes):
    answers = [tiny_prediction(0, 'x', 'x'), tiny_prediction(1, 'y', 'y', image_sizes=sizes)]
    write_lines(tmp_path / 'run/test/base/predictions.jsonl', answers)
    page = page_of(tmp_path / 'run')
    assert re.findall(r'test\.jsonl:\d', page.section('answers')) == ['test.jsonl:1']
    assert 'test/base/predictions.jsonl: 1 line could not be read' in page.section('overview')


def test_a_number_that_cannot_be_drawn_is_left_out(run):
    write_lines(run / 'validation.jsonl', [dict(iteration=i, cer=10**400 if i == 2 else 0.5) for i in (1, 2, 10**400)])
    (found,) = read_runs([str(run)])
    assert found.validation_series('cer') == [(1, 0.5)]
    assert page_of(run).section('validation')


def test_a_config_is_read_and_never_run(tmp_path):
    config = f"""
import os
open({str(tmp_path / 'ran')!r}, 'w')
a = dict(b=dict(image_folder='second'), c=[1, 2])
test_dataloader = dict(dataset=dict(image_folder='first'))
x = dict(image_folder=open({str(tmp_path / 'ran')!r}, 'w'))
y = z = dict(**a)
"""
    assert image_folders(config) == ['first', 'second']
    assert settings_of(config)['a.c'] == '[1, 2]'
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('value', ['+'.join(['"a"'] * 700), '-' * 700 + '1', 'dict(a=' * 700 + '1' + ')' * 700])
def test_a_config_that_is_nested_too_deeply_says_nothing(value):
    config = f'image_folder = {value}'
    assert (image_folders(config), settings_of(config)) == ([], {})
