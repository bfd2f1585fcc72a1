"""Images and data files of strangers, through ``vlmtune check-data``: each is a bad row that is named, and no more.

Elsewhere: bombs and broken files one by one, tests/data/test_images.py; hosts, logins in URLs and redirects,
tests/data/test_downloads.py.
"""

import io
import json
import os
import pickle
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.apps.data.check_data import check_data
from vlmtune.cli import main
from vlmtune.utils.errors import DATA_ERROR_KINDS, DataError


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, *more):
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return (
        b'\x89PNG\r\n\x1a\n' + header + b''.join(more) + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b'')
    )


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'JPEG')
    data = bytearray(buffer.getvalue())
    at = data.index(b'\xff\xc0')
    data[at + 5 : at + 9] = struct.pack('>HH', height, width)
    return bytes(data)


def tiff(width, height):
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 1)]
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    return b'II*\x00' + struct.pack('<I', 8) + struct.pack('<H', len(tags)) + entries + bytes(4)


def gif(frames, width, height):
    """Every frame of one pixel's data on a large canvas."""
    head = b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80, 0, 0) + bytes(6)
    frame = b'!\xf9\x04\x04\x00\x00\x00\x00' + b',' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + b'\x02\x02D\x01\x00'
    return head + frame * frames + b';'


def webp(width, height):
    """An extended header says up to 2^24 pixels a side."""
    body = (
        b'VP8X'
        + struct.pack('<I', 10)
        + bytes(4)
        + (width - 1).to_bytes(3, 'little')
        + (height - 1).to_bytes(3, 'little')
    )
    return b'RIFF' + struct.pack('<I', len(body) + 4) + b'WEBP' + body


FILES = {
    'ten_gigapixels.png': png(100_000, 100_000),
    'largest.png': png(2**31 - 1, 2**31 - 1),
    'text_bomb.png': png(10_000, 10_000, chunk(b'zTXt', b'a\x00\x00' + zlib.compress(bytes(10**8)))),
    'profile_bomb.png': png(10_000, 10_000, chunk(b'iCCP', b'a\x00\x00' + zlib.compress(bytes(10**8)))),
    'large.jpg': jpeg(65_500, 65_500),
    'large.tiff': tiff(2**31 - 1, 2**31 - 1),
    'large.webp': webp(2**24, 2**24),
    'large.gif': gif(1, 65_535, 65_535),
    'large.bmp': b'BM'
    + struct.pack('<IHHIIiiHHIIiiII', 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
    'large.ppm': b'P6 2000000000 2000000000 255\n' + bytes(10),
    'drawing.svg': b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    'script.eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(MARK) (w) file closefile\n',
    'pickle.png': pickle.dumps([1]),
    'page.jpg': b'<html>',
}  # fmt: skip
PATHS = [
    '../secret.png', 'folder/../../secret.png', '/etc/passwd', '/dev/zero', '/proc/self/environ', 'link.png',
    'out/secret.png', 'file:///etc/passwd', 'file://localhost/etc/passwd', 'FILE:///etc/passwd', 'ftp://127.0.0.1/a', 'gopher://127.0.0.1/a',
    'data:text/html,x', '\\\\127.0.0.1\\share\\a.png', '~/.netrc', 'a\x00.png', '.', 'x' * 5000,
]  # fmt: skip
HOSTS = [
    '127.0.0.1',
    'localhost',
    '[::1]',
    '2130706433',
    '0x7f.1',
    '0177.0.0.1',
    '127.1',
    '0',
    'me@127.0.0.1',
    '127.0.0.1.',
]


def write_rows(path, images):
    row = [{'from': 'human', 'value': '<image>\nwhat?'}, {'from': 'gpt', 'value': 'x'}]
    path.write_text(''.join(json.dumps(dict(image=image, conversations=row)) + '\n' for image in images))
    return path


def wrong_rows(capsys):
    """The kind of mistake of every row that the report names, in the order of the rows."""
    (data_set,) = json.loads(capsys.readouterr().out.splitlines()[-1])['data_sets']
    errors = [problem for problem in data_set['problems'] if problem['kind'] in DATA_ERROR_KINDS]
    assert all(len(problem['reason']) < 900 and '\n' not in problem['reason'] for problem in errors)
    found = {problem['where']: problem['kind'] for problem in errors}
    return [found.get(f'rows.jsonl:{line}') for line in range(1, data_set['rows'] + 1)]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / 'images'
    (images / 'folder').mkdir(parents=True)
    for name, data in FILES.items():
        (images / name).write_bytes(data)
    Image.new('RGB', (30, 30)).save(tmp_path / 'secret.png')
    (images / 'link.png').symlink_to(tmp_path / 'secret.png')
    (images / 'out').symlink_to(tmp_path)
    return images


def test_no_image_is_decoded_that_is_too_large_and_none_is_run(folder, recipe, bounded, tmp_path, tiny_model, capsys):
    rows = write_rows(tmp_path / 'rows.jsonl', FILES)
    config = recipe(model=tiny_model('qwen2_5_vl'), data=rows, images=folder)
    with bounded():
        assert check_data(config, as_json=True, decode=True) == 1
    kinds = dict(zip(FILES, wrong_rows(capsys), strict=True))
    assert {name: kind for name, kind in kinds.items() if kind not in ('broken_image', 'oversized_image')} == {}
    assert kinds['ten_gigapixels.png'] == kinds['large.jpg'] == kinds['large.gif'] == 'oversized_image'


def test_no_path_leads_out(folder, recipe, bounded, tmp_path, tiny_model, capsys):
    rows = write_rows(tmp_path / 'rows.jsonl', PATHS)
    with bounded():
        assert check_data(recipe(model=tiny_model('qwen2_5_vl'), data=rows, images=folder), as_json=True) == 1
    kinds = dict(zip(PATHS, wrong_rows(capsys), strict=True))
    assert None not in kinds.values(), kinds
    assert kinds['../secret.png'] == kinds['link.png'] == kinds['/etc/passwd'] == 'refused_image'


def test_no_host_is_asked_that_was_not_named(recipe, bounded, tmp_path, tiny_model, capsys):
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        rows = write_rows(tmp_path / 'rows.jsonl', [f'http://{host}:{port}/a.png' for host in HOSTS])
        with bounded():
            assert check_data(recipe(model=tiny_model('qwen2_5_vl'), data=rows, images=tmp_path), as_json=True) == 1
        with pytest.raises(TimeoutError):
            server.accept()
    assert wrong_rows(capsys) == ['refused_image'] * len(HOSTS)


@pytest.mark.parametrize('name', ['x.pkl', 'x.pt', 'x.npy', 'x.npz', 'x.joblib', 'x.h5', 'x.py'])
def test_a_data_set_in_a_format_that_can_hold_objects(name, recipe, refused, touch, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (touch,)

    writers = {'.pt': torch.save, '.npy': lambda value, path: np.save(path, np.array([value], dtype=object))}
    path = tmp_path / name
    writers.get(path.suffix, lambda value, path: path.write_bytes(pickle.dumps(value)))(Payload(), path)
    with refused('ends in .*; expected .json', DataError):
        check_data(recipe(data=path))


@pytest.mark.parametrize('name', ['x.json', 'x.jsonl', 'x.csv', 'x.parquet', 'x.arrow'])
def test_a_pickle_that_pretends(name, recipe, bounded, touch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))

    class Payload:
        def __reduce__(self):
            return os.system, (touch,)

    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    with bounded():
        assert main(['check-data', recipe(data=tmp_path / name)]) == 1
    assert '--debug' not in capsys.readouterr().err  # which is how a failure that nobody foresaw is told


def test_a_folder_with_a_loading_script(recipe, refused, mark, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'data.py').write_text(f'open({str(mark)!r}, "w")\n')
    with refused('holds no parquet file', DataError):
        check_data(recipe(data=tmp_path / 'data'))
