"""Rows from files of text; what is broken in them is named with its place."""

import json
import pickle
import subprocess
import sys

import pytest

from vlmtune.data.row_streams import stream_rows
from vlmtune.data.sources import fingerprint, load_rows, where
from vlmtune.utils.errors import DataError

ROWS = [{'id': 0, 'text': 'a'}, {'id': 'one', 'images': ['x'], 'text': 'é\u2028'}]


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    return datasets


@pytest.mark.parametrize(
    ('name', 'text', 'places'),
    [
        ('a.json', json.dumps(ROWS), ['a.json[0]', 'a.json[1]']),
        ('a.json', json.dumps({'version': 1, 'data': ROWS}, ensure_ascii=False), ['a.json[0]', 'a.json[1]']),
        ('a.json', '\ufeff' + json.dumps(ROWS), ['a.json[0]', 'a.json[1]']),
        (
            'a.jsonl',
            '\n' + ' \n\n'.join(json.dumps(row, ensure_ascii=False) for row in ROWS) + '\n\n',
            ['a.jsonl:2', 'a.jsonl:4'],
        ),
        ('a.JSONL', '\r\n'.join(map(json.dumps, ROWS)), ['a.JSONL:1', 'a.JSONL:2']),
    ],
)
def test_json(tmp_path, name, text, places):
    (tmp_path / name).write_text(text, encoding='utf-8', newline='')
    rows = load_rows(str(tmp_path / name))
    assert list(rows) == ROWS
    assert (len(rows), rows[-1], rows[:1]) == (2, ROWS[1], ROWS[:1])
    assert [where(rows, i) for i in range(2)] == places


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl'])
def test_rows_stay_in_their_file(tmp_path, name):
    texts = [json.dumps({'id': i, 'text': 'x' * i}) for i in range(500)]
    (tmp_path / name).write_text('\n'.join(texts) if name == 'a.jsonl' else f'[{", ".join(texts)}]')
    rows = load_rows(tmp_path / name)
    assert rows[-1]['id'] == 499
    copied = pickle.dumps(rows)
    assert len(copied) < 500
    assert pickle.loads(copied)[7] == {'id': 7, 'text': 'x' * 7}
    with pytest.raises(IndexError):
        rows[500]
    assert fingerprint(rows) == fingerprint(load_rows(tmp_path / name))


def test_a_broken_line_spoils_no_other(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(
        b'{"a": 1}\n{"a"\n{"b": "\xff"}\n7\n' + b'[' * 100_000 + b'\n' + b'9' * 5000 + b'\n{"a": 2}'
    )
    rows = load_rows(tmp_path / 'a.jsonl')
    assert len(rows) == 7
    assert (rows[0], rows[6]) == ({'a': 1}, {'a': 2})
    reasons = ['broken JSON at column 5', r'not UTF-8 text \(byte 21', 'a row is of type int', 'JSON nested too deeply']
    reasons.append('a number of more digits')
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(DataError, match=f'^{reason}') as error:
            rows[index]
        assert error.value.kind == 'unreadable_row'
        assert where(rows, index) == f'a.jsonl:{index + 1}'


def test_a_stream_says_of_every_row_what_its_file_says(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": \n\n{"b": "\xff"}\n7\n' + b'[' * 100_000 + b'\n{"a": 2}')
    rows = load_rows(path)
    told: list[list] = [[], []]
    for index, streamed in enumerate(stream_rows(path).read()):
        assert streamed.where == where(rows, index)
        for ask, answers in zip((streamed.load, lambda i=index: rows[i]), told, strict=True):
            try:
                answers.append(ask())
            except DataError as error:
                answers.append(str(error))
    assert told[0] == told[1]
    assert [type(answer) for answer in told[0]] == [dict, str, str, str, str, dict]


def test_a_file_that_is_cut_while_it_is_in_use(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"a": 1}\n{"a": 2}\n')
    rows = load_rows(tmp_path / 'a.jsonl')
    assert len(rows) == 2
    (tmp_path / 'a.jsonl').write_text('{')
    with pytest.raises(DataError, match='^broken JSON'):
        rows[1]


def test_fingerprints(tmp_path):
    (tmp_path / 'a.csv').write_text('a\n1\n')
    (tmp_path / 'b.csv').write_text('a\n2\n')
    prints = [fingerprint(load_rows(tmp_path / 'a.csv')), fingerprint(load_rows(tmp_path / 'b.csv'))]
    prints += [fingerprint([{'a': 1}]), fingerprint([{'a': 2}]), fingerprint([{'a': 1}, {}])]
    assert len(set(prints)) == len(prints)
    assert fingerprint([{'a': object()}]) is None
    assert fingerprint([{'a': 1, 'b': 2}]) == fingerprint([{'b': 2, 'a': 1}])


def test_csv_guesses_nothing(tmp_path):
    (tmp_path / 'a.csv').write_text('instruction,input,output\n"two\nlines",,NA\n\n"x,y",007,None\n')
    rows = load_rows(tmp_path / 'a.csv')
    assert list(rows) == [
        {'instruction': 'two\nlines', 'input': None, 'output': 'NA'},
        {'instruction': 'x,y', 'input': '007', 'output': 'None'},
    ]
    assert where(rows, 0) == 'a.csv:2'


def test_where_for_a_plain_list():
    assert where(ROWS, 1) == 'rows[1]'


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.jsonl', b'{"a": 1}\n\n{"a": \n', '^broken JSON at column 7'),
        ('a.jsonl', b'[\n{"a": 1}\n]', r'^broken JSON .*name the file \.json'),
        ('a.jsonl', b'{"a": 1}\n[2]', '^a row is of type list; expected an object'),
        ('a.json', b'[{"a": 1}, 5]', '^a row is of type int'),
    ],
)
def test_a_broken_row_says_what_is_wrong_and_where_says_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(load_rows(tmp_path / name))
    assert name not in str(error.value)
    assert error.value.kind == 'unreadable_row'


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.jsonl', b'\n\n', 'holds no rows'),
        ('a.json', b'[{"a": 1},\n{"a" 1}]', r'/a\.json:2: broken JSON at column 6'),
        ('a.json', b'{"a": 1}\n{"a": 2}', r'/a\.json:2: .*name the file \.jsonl'),
        ('a.json', b'{"rows": [], "b": 1}', "one object with the keys 'rows', 'b'; expected a list"),
        ('a.json', b'3', 'holds a int; expected a list'),
        ('a.json', b'[]', 'holds no rows'),
        ('a.json', b'', r'/a\.json:1: broken JSON'),
        ('a.json', b'[' * 100_000, 'nested too deeply'),
        ('a.json', b'[' + b'9' * 5000 + b']', 'a number of more digits'),
        ('a.json', b'["\xff"]', r'is not UTF-8 text \(byte 2'),
        ('a.csv', b'a,b\n1,2\n1,2,3\n', r'/a\.csv:3: 3 cells, but the header has 2'),
        ('a.csv', b'a,b\n"1,2\n', 'broken CSV'),
        ('a.csv', b'a,b\n', 'holds no rows'),
        ('a.parquet', b'junk' * 10, r'/a\.parquet cannot be read: .*[Pp]arquet'),
        ('a.arrow', b'junk' * 10, r'/a\.arrow cannot be read'),
        ('a.txt', b'x', r"/a\.txt ends in '\.txt'; expected \.json, \.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, hf_cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(load_rows(str(tmp_path / name)))
    assert str(tmp_path) in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'path', ['train.json', 'data/none.parquet', './some/folder', '../x', 'a b', 'a/b/c', '~no such user/x']
)
def test_a_missing_file_is_named_in_full(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'data file not found: /.*data_path') as error:
        load_rows(path)
    assert str(tmp_path / path) in str(error.value)


def test_one_file_has_no_splits(tmp_path):
    (tmp_path / 'a.json').write_text('[{}]')
    for options in ({'split': 'test'}, {'name': 'x'}):
        with pytest.raises(DataError, match='is one file, which has no split'):
            load_rows(tmp_path / 'a.json', **options)


def test_reading_json_imports_no_datasets(tmp_path):
    (tmp_path / 'a.json').write_text('[{}]')
    code = (
        'import importlib.util, sys, pathlib\n'
        'spec = importlib.util.spec_from_file_location("sources", pathlib.Path(sys.argv[1]))\n'
        'module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n'
        'module.load_rows(sys.argv[2]); sys.exit("datasets" in sys.modules)'
    )
    source = sys.modules['vlmtune.data.sources'].__file__
    assert subprocess.run([sys.executable, '-c', code, source, str(tmp_path / 'a.json')], check=False).returncode == 0
