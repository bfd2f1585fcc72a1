"""Rows are found where json finds them, whatever the size of the pieces that are read."""

import json

import pytest

from vlmtune.data.json_index import index_lines, index_list
from vlmtune.utils.errors import DataError

ROWS = [
    {'text': 'é\u2028"\\ud83d\\n[{', 'n': -1.5e3},
    {},
    [],
    'a \U0001f600 "quoted" \\',
    12345,
    None,
    {'deep': [[{'a': [1, {'b': ']'}]}]]},
]
TEXTS = {
    'list': json.dumps(ROWS),
    'wide': json.dumps(ROWS, indent=3, ensure_ascii=False),
    'object': json.dumps({'version': [1, {'data': 2}], 'data': ROWS, 'more': {'x': '}'}}, ensure_ascii=False),
    'twice': f'{{"data": [1], "data": {json.dumps(ROWS)}}}',
    'bom': '\ufeff' + json.dumps(ROWS),
    'spaces': f' \r\n\t{json.dumps(ROWS)} \n',
}


@pytest.mark.parametrize('chunk', [1, 2, 7, 1 << 20])
@pytest.mark.parametrize('name', TEXTS)
def test_elements_of_a_list(name, chunk, tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(TEXTS[name].encode())
    found, data = index_list(path, chunk=chunk), path.read_bytes()
    assert [json.loads(data[a:b]) for a, b in zip(found.starts, found.ends, strict=True)] == ROWS
    assert found.lines is None


@pytest.mark.parametrize('chunk', [1, 5, 1 << 20])
@pytest.mark.parametrize(
    'text',
    ['[{"a": 1},\n {"b": tru}]', '[1,\n\n 2 3]', '[1, ]', '["a\nb"]', '[{"a" 1}]', '{"data": [1, 2}', '["\\ud8"]',
     '[1] []', '{"data": [], }', '{1: 2}', '["a', '[1', '[', '', 'nul', '[-]'],
)  # fmt: skip
def test_mistakes_stand_where_json_says(text, chunk, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    with pytest.raises(DataError) as ours:
        index_list(path, chunk=chunk)
    place = f'a.json:{theirs.value.lineno}: broken JSON at column {theirs.value.colno}: {theirs.value.msg}'
    assert place in str(ours.value)


@pytest.mark.parametrize('text', ['{"data": [1], "data": 2}', '{"data": {}, "b": []}', '{}'])
def test_objects_without_a_list_under_data(text, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(DataError, match=r"is one object with the keys .*expected a list of rows, or one under 'data'"):
        index_list(path)


@pytest.mark.parametrize('chunk', [1, 3, 1 << 20])
def test_bytes_that_are_no_text(chunk, tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes('["é", "'.encode() + b'\xff"]')
    with pytest.raises(DataError, match=r'is not UTF-8 text \(byte 8:'):
        index_list(path, chunk=chunk)


def test_a_row_is_dropped_before_the_next_is_read(tmp_path):
    """Peak memory of Python objects and buffers, in bytes, for a file of 8 MB: far less than the file."""
    import tracemalloc

    path = tmp_path / 'a.json'
    path.write_text(json.dumps([{'text': 'x' * 1000}] * 8000))
    tracemalloc.start()
    assert len(index_list(path, chunk=1 << 16).starts) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize('chunk', [1, 4, 1 << 20])
@pytest.mark.parametrize('end', ['', '\n', '\r\n', '\n \n\t\n'])
def test_lines(chunk, end, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(f'\ufeff\n{{"a": 1}}\r\n\n  {{"b": "\u2028"}}\n\u3000\n[broken{end}'.encode())
    found, data = index_lines(path, chunk=chunk), path.read_bytes()
    lines = [data[a:b].decode().strip() for a, b in zip(found.starts, found.ends, strict=True)]
    assert lines == ['{"a": 1}', '{"b": "\u2028"}', '[broken']
    assert found.lines.tolist() == [2, 4, 6]
