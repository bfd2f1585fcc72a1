"""Files of JSON lines outlive a kill in the middle of a line, and names that are no text."""

import json

from vlmtune.utils.json_lines import append_lines, as_line, parse_json, parse_lines


def test_rows_behind_half_a_line_are_not_lost_with_it(tmp_path):
    path = tmp_path / 'a.jsonl'
    append_lines(path, [dict(step=1), dict(step=2)])
    path.write_text(path.read_text()[:-4])
    append_lines(path, [dict(step=3)])
    append_lines(path, [])
    append_lines(path, [dict(step=4)])
    assert [*parse_lines(path.read_text().split('\n'))] == [dict(step=1), None, dict(step=3), dict(step=4)]


def test_a_row_is_one_line_whatever_it_holds(tmp_path):
    row = dict(name='half \ud83d, byte \udcff, \u2028 \x85 \r\n "', 菜='葱')
    append_lines(tmp_path / 'a', [row, row])
    text = (tmp_path / 'a').read_text('utf-8')
    assert [*parse_lines(text.split('\n'))] == [row, row]
    assert '葱' in text
    assert json.loads(as_line(row)) == row


def test_what_is_no_object_is_told_apart_from_nothing():
    assert [*parse_lines(['{"a": 1}\n', '', ' \n', '[1]', '3', '{"a": ', '[' * 100_000])] == [{'a': 1}, *[None] * 4]
    assert parse_json('[1]') == [1]
