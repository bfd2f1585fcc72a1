"""A row that cannot be used stops the run or is skipped within a budget; its place and reason are told."""

import json
from functools import partial

import pytest

from tests.data.squares import BAD, GOOD, LONG, lines_of, row
from vlmtune.data import SupervisedDataset, chat_template_map_fn, load_rows
from vlmtune.data.bad_rows import BadSample, note_bad_sample
from vlmtune.utils.errors import DataError


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (BAD, r'sample 1 \(train.jsonl:2\): image not found: .*gone.png'),
        (row('<image>\nWhat?', 'x', image='../x.png'), r'sample 1 \(train.jsonl:2\): image outside the image folder'),
        (row('<image>\nWhat?', 'x'), r'sample 1 \(train.jsonl:2\): has 1 <image> mark but 0 images'),
        (row('What?'), r'sample 1 \(train.jsonl:2\): has no answer'),
        ({'text': 'x'}, r'sample 1 \(train.jsonl:2\): .*conversations'),
    ],
)
def test_the_first_bad_row_stops_and_is_named(bad, message, build):
    with pytest.raises(DataError, match=message):
        build(GOOD, bad)


def test_bad_rows_are_skipped_within_a_budget(build, caplog):
    dataset = build(GOOD, BAD, GOOD, GOOD, on_bad_sample='skip', bad_sample_budget=0.25)
    assert len(dataset) == 3
    assert [(bad.index, bad.where) for bad in dataset.bad_samples] == [(1, 'train.jsonl:2')]
    assert 'gone.png' in dataset.bad_samples[0].reason
    assert '1 of 4 samples are bad and were skipped' in caplog.text
    with pytest.raises(
        DataError, match=r'2 of 4 samples are bad, more than bad_sample_budget=0.25; the first is sample 1'
    ):
        build(GOOD, BAD, BAD, GOOD, on_bad_sample='skip', bad_sample_budget=0.25)
    assert len(build(GOOD, BAD, on_bad_sample='skip')) == 1, 'of few rows, one may be bad'
    with pytest.raises(DataError, match=r'2 of 3 samples are bad, more than bad_sample_budget=0.01'):
        build(GOOD, BAD, BAD, on_bad_sample='skip')
    with pytest.raises(DataError, match=r'1 of 2 samples are bad, more than bad_sample_budget=0;'):
        build(GOOD, BAD, on_bad_sample='skip', bad_sample_budget=0)


def test_nothing_left(build):
    with pytest.raises(DataError, match='none of 1 rows can be used'):
        build(BAD, on_bad_sample='skip', bad_sample_budget=1.0)


@pytest.mark.parametrize('broken', ['{"conversations": [', '[1, 2]', '"text"', '{"a": "\\ud8"}'])
def test_a_broken_line_is_a_bad_row(broken, build, tmp_path):
    build(GOOD)  # writes the file
    path = tmp_path / 'train.jsonl'
    path.write_text('\n'.join([json.dumps(GOOD), '', broken, json.dumps(GOOD)]))
    again = partial(build, rows=dict(type=load_rows, path=str(path)))
    with pytest.raises(DataError, match=r'^sample 1 \(train.jsonl:3\): (?!.*train.jsonl)'):
        again()
    dataset = again(on_bad_sample='skip', bad_sample_budget=0.5)
    assert len(dataset) == 2
    assert [(bad.index, bad.where, bad.error) for bad in dataset.bad_samples] == [
        (1, 'train.jsonl:3', 'unreadable_row')
    ]
    assert [dataset.row_of(i) for i in range(2)] == [0, 2]
    assert dataset.where(1) == 'train.jsonl:4'


def test_what_could_not_be_used_is_written_down(build, tmp_path):
    path = tmp_path / 'new' / 'bad_samples.jsonl'
    settings = dict(on_bad_sample='skip', max_length=64, bad_samples_file=str(path))
    build(GOOD, LONG, BAD, GOOD, row('What?'), bad_sample_budget=0.4, **settings)
    long, missing, empty = lines_of(path)
    assert (long['index'], long['where'], long['kind']) == (1, 'train.jsonl:2', 'overlong')
    assert long['images'] == ['0.png', '1.png']
    assert long['reason'].endswith('tokens, max_length is 64')
    assert (missing['index'], missing['kind'], missing['error']) == (2, 'bad', 'missing_image')
    assert missing['images'] == ['gone.png']
    assert (empty['index'], empty['kind'], empty['images']) == (4, 'bad', [])
    with pytest.raises(DataError, match='more than bad_sample_budget'):
        build(GOOD, BAD, bad_sample_budget=0, **settings)
    assert [line['index'] for line in lines_of(path)] == [1], 'written before the run stops'
    build(GOOD, **settings)
    assert path.read_text() == '', 'fresh'


def test_a_name_that_is_no_text_is_written_down_once(tmp_path):
    bad = BadSample(0, 'half \ud83d.jsonl:1', 'gone', 'bad', 'missing_image', ('\udcff.png',))
    for _ in range(2):
        note_bad_sample(bad, file=tmp_path / 'bad_samples.jsonl')
    (line,) = lines_of(tmp_path / 'bad_samples.jsonl')
    assert (line['where'], line['images']) == ('half \ud83d.jsonl:1', ['\udcff.png'])


def test_a_mistake_in_a_users_function_names_the_row(processor):
    def fail(value):
        return {}[value['id']]

    with pytest.raises(KeyError) as error:
        SupervisedDataset(
            [dict(id=3)], processor=processor('qwen2'), dataset_map_fn=fail, template_map_fn=chat_template_map_fn
        )
    assert error.value.__notes__ == ['while planning sample 0 (rows[0])']
