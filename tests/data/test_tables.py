"""Rows from parquet and Arrow files, from folders of them, and from the hub."""

import io
import os
import pickle

import pytest
from PIL import Image

from vlmtune.data.sources import fingerprint, load_rows, where
from vlmtune.utils.errors import DataError


def picture():
    buffer = io.BytesIO()
    Image.new('RGB', (3, 2)).save(buffer, 'PNG')
    return buffer.getvalue()


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    return datasets


@pytest.fixture
def table(hf_cache):
    datasets = hf_cache
    rows = [
        {'id': i, 'image': {'bytes': picture(), 'path': 'x.png'}, 'images': [{'bytes': b'broken', 'path': None}]}
        for i in range(3)
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column('image', datasets.Image())
    return dataset.cast_column('images', datasets.List(datasets.Image()))


def check(rows, place):
    assert len(rows) == 3
    assert [row['id'] for row in rows] == [0, 1, 2]
    assert rows[2]['image'] == {'bytes': picture(), 'path': 'x.png'}, 'decoded'
    assert rows[1]['images'] == [{'bytes': b'broken', 'path': None}], 'decoded'
    assert [row['id'] for row in rows[1:]] == [1, 2]
    assert where(rows, 2) == place
    assert fingerprint(rows)
    assert pickle.loads(pickle.dumps(rows))[1]['id'] == 1


def test_parquet_file(table, tmp_path):
    table.to_parquet(tmp_path / 'a.parquet')
    check(load_rows(tmp_path / 'a.parquet'), 'a.parquet[2]')


@pytest.mark.parametrize('kind', ['stream', 'file'])
def test_arrow_file(table, tmp_path, kind):
    import pyarrow as pa

    new = pa.ipc.new_stream if kind == 'stream' else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / 'a.arrow'), 'wb') as sink, new(sink, table.data.schema) as writer:
        writer.write_table(table.data.table)
    check(load_rows(tmp_path / 'a.arrow'), 'a.arrow[2]')


def test_folder_of_save_to_disk(table, hf_cache, tmp_path):
    table.save_to_disk(tmp_path / 'one')
    check(load_rows(tmp_path / 'one'), 'one[2]')
    with pytest.raises(DataError, match="has no split 'test'"):
        load_rows(tmp_path / 'one', split='test')

    hf_cache.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / 'two')
    check(load_rows(tmp_path / 'two'), 'two/train[2]')
    assert len(load_rows(tmp_path / 'two', split='test')) == 1
    with pytest.raises(DataError, match=r"/two has no split 'val', only train, test"):
        load_rows(tmp_path / 'two', split='val')


def test_a_table_file_is_known_by_its_content(table, tmp_path):
    """Not by its time of change, which copying and unpacking keep."""
    path = tmp_path / 'a.parquet'
    table.to_parquet(path)
    before, time = fingerprint(load_rows(path)), path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 10**9))
    assert fingerprint(load_rows(path)) == before
    table.select([1]).to_parquet(path)
    os.utime(path, ns=(time, time))
    rows = load_rows(path)
    assert len(rows) == 1
    assert fingerprint(rows) != before


def test_folder_of_parquet_files(table, tmp_path):
    (tmp_path / 'd' / 'data').mkdir(parents=True)
    table.select([0, 1]).to_parquet(tmp_path / 'd' / 'data' / 'train-00000-of-00002.parquet')
    table.select([2]).to_parquet(tmp_path / 'd' / 'data' / 'train-00001-of-00002.parquet')
    table.select([1]).to_parquet(tmp_path / 'd' / 'data' / 'test-00000-of-00001.parquet')
    check(load_rows(tmp_path / 'd'), 'd/train[2]')
    assert [row['id'] for row in load_rows(tmp_path / 'd', split='test')] == [1]
    assert len(load_rows(tmp_path / 'd', split='train[:2]')) == 2
    with pytest.raises(DataError, match=r'/d cannot be read: .*nope'):
        load_rows(tmp_path / 'd', split='nope')


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'x')
    with pytest.raises(DataError, match='holds no parquet file'):
        load_rows(tmp_path)


def test_hub_id(table, hf_cache, monkeypatch):
    calls = []

    def answer(path, name, *, split):
        calls.append((path, name, split))
        if path == 'nobody/nothing':
            raise hf_cache.exceptions.DatasetNotFoundError('no such data set')
        return table

    monkeypatch.setattr(hf_cache, 'load_dataset', answer)
    monkeypatch.setattr('vlmtune.data.sources.hub_answers', lambda: True)
    check(load_rows('owner/set-1.0', name='small', split='test'), 'owner/set-1.0/test[2]')
    check(load_rows('squad'), 'squad/train[2]')
    assert calls == [('owner/set-1.0', 'small', 'test'), ('squad', None, 'train')]
    with pytest.raises(
        DataError, match=r'there is no file /.*/nobody/nothing, and .* cannot be read: no such data set'
    ):
        load_rows('nobody/nothing')
