"""Tiny data sets: real images, every kind of row, the same files for the same seed."""

import json

import pytest
from PIL import Image

from vlmtune.testing import write_tiny_data

FORMATS = ['llava', 'sharegpt', 'openai', 'minicpmv', 'alpaca']


def rows_of(data):
    text = data.data_path.read_text()
    return [json.loads(line) for line in text.splitlines()] if data.data_path.suffix == '.jsonl' else json.loads(text)


def images_of(row):
    found = row.get('images', row.get('image', []))
    return [found] if isinstance(found, str) else list(found.values()) if isinstance(found, dict) else found


def texts_of(row):
    turns = row.get('messages') or row.get('conversations')
    return [turn.get('value', turn.get('content')) for turn in turns] if turns else [row['instruction'], row['output']]


@pytest.mark.parametrize('format', FORMATS)
def test_rows_of_every_kind(format, tiny_data):
    data = tiny_data(format, rows=8)
    rows = rows_of(data)
    counts = [0] * 8 if format == 'alpaca' else [1, 0, 2, 1] * 2
    assert [len(images_of(row)) for row in rows] == counts
    assert len({len(texts_of(row)) + len(row.get('history', ())) for row in rows}) > 1  # one turn and several


@pytest.mark.parametrize('format', FORMATS[:-1])
def test_marks_and_images_agree(format, tiny_data):
    data = tiny_data(format, rows=8)
    for row in rows_of(data):
        text = ' '.join(texts_of(row))
        marks = list(row['image']) if isinstance(row.get('image'), dict) else ['<image>']
        assert sum(text.count(mark) for mark in marks) == len(images_of(row))
        for name in images_of(row):
            with Image.open(data.image_folder / name) as image:
                assert image.format == ('JPEG' if name.endswith('.jpg') else 'PNG')
                assert image.mode == 'RGB'
                assert all(28 <= side <= 120 for side in image.size)


def test_image_sizes_differ(tiny_data):
    sizes = {Image.open(path).size for path in tiny_data('llava', rows=8).image_folder.iterdir()}
    assert len(sizes) == 8


def test_the_answer_is_in_the_picture(tiny_data):
    data = tiny_data('llava', rows=8)
    row = rows_of(data)[0]
    colour = row['conversations'][1]['value'].removesuffix('.').rsplit(' ', 1)[1]
    with Image.open(data.image_folder / row['image']) as image:
        found = {pixel for _, pixel in image.getcolors()}
    assert Image.new('RGB', (1, 1), colour).getpixel((0, 0)) in found


def test_the_seed_decides(tmp_path):
    def content(name, **kwargs):
        data = write_tiny_data(tmp_path / name, **kwargs)
        return data.data_path.read_bytes(), {path.name: path.read_bytes() for path in data.image_folder.iterdir()}

    assert content('a') == content('b')
    assert content('c', seed=1) != content('a')


def test_without_images(tmp_path):
    data = write_tiny_data(tmp_path, rows=4, images=False)
    assert not any(images_of(row) for row in rows_of(data))
    assert '<image>' not in data.data_path.read_text()


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no tiny data of format 'lava'; known are llava, "):
        write_tiny_data(tmp_path, format='lava')
