"""Bytes on the disk with their hash; a disk that fails is an OSError, and what was there before stays."""

import errno
import hashlib
import os
from collections.abc import Callable

import numpy as np
import pytest

from vlmtune.utils import disk
from vlmtune.utils.disk import Written


class FaultyOs:
    """``os`` whose ``call`` fails, or does what ``instead`` does."""

    def __init__(self, call: str, instead: Callable) -> None:
        self._faults = {call: instead}

    def __getattr__(self, name):
        return self._faults.get(name) or getattr(os, name)


def fail(number):
    def go(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return go


@pytest.mark.parametrize(
    'blocks',
    [
        [],
        [b''],
        [b'abc', b'', b'd' * 1000],
        [memoryview(np.arange(12, dtype='<i4').reshape(3, 4)), memoryview(np.zeros((0, 5)))],
        [bytes(range(256)) * (3 << 17)],  # several pieces
    ],
)
def test_what_is_written_is_there_with_its_size_and_hash(blocks, tmp_path):
    content = b''.join(bytes(block) for block in blocks)
    path = tmp_path / 'new' / 'folder' / 'file'
    assert disk.write_file(path, blocks) == Written(len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    assert disk.hash_file(path) == hashlib.sha256(content).hexdigest()


def test_a_disk_that_takes_few_bytes_at_a_time_gets_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, 'os', FaultyOs('write', lambda descriptor, data: os.write(descriptor, data[:7])))
    content = bytes(range(200))
    written = disk.write_file(tmp_path / 'a', [content[:50], content[50:]])
    assert (tmp_path / 'a').read_bytes() == content
    assert written == Written(200, hashlib.sha256(content).hexdigest())


def test_a_disk_that_takes_nothing_any_more_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, 'os', FaultyOs('write', lambda *_: 0))
    with pytest.raises(OSError, match='takes no more bytes'):
        disk.write_file(tmp_path / 'a', [b'x'])


@pytest.mark.parametrize('call', ['write', 'fsync', 'open'])
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_an_oserror_with_its_number(call, number, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, 'os', FaultyOs(call, fail(number)))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        disk.write_file(tmp_path / 'a', [b'x'])
    assert caught.value.errno == number


def test_files_are_flushed_before_they_are_closed(tmp_path, monkeypatch):
    calls = []
    spy = FaultyOs('fsync', lambda descriptor: calls.append(os.readlink(f'/proc/self/fd/{descriptor}')))
    monkeypatch.setattr(disk, 'os', spy)
    disk.write_file(tmp_path / 'a', [b'x'])
    disk.flush_directory(tmp_path)
    assert calls == [str(tmp_path / 'a'), str(tmp_path)]


def test_no_descriptor_stays_open_after_a_failure(tmp_path, monkeypatch):
    before = len(os.listdir('/proc/self/fd'))
    monkeypatch.setattr(disk, 'os', FaultyOs('fsync', fail(errno.EIO)))
    for number in range(5):
        with pytest.raises(OSError, match='Input/output'):
            disk.write_file(tmp_path / str(number), [b'x'])
        with pytest.raises(OSError, match='Input/output'):
            disk.flush_directory(tmp_path)
    assert len(os.listdir('/proc/self/fd')) == before


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / 'a').write_text('old')
    (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
    for name in ('a', 'link'):
        with pytest.raises(FileExistsError):
            disk.write_file(tmp_path / name, [b'new'])
    assert (tmp_path / 'a').read_text() == 'old'
    assert not (tmp_path / 'elsewhere').exists()


def test_a_file_system_that_cannot_flush_directories_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, 'os', FaultyOs('fsync', fail(errno.EINVAL)))
    disk.flush_directory(tmp_path)


@pytest.mark.parametrize('call', ['write', 'fsync', 'replace', 'open'])
def test_a_text_is_the_old_one_or_the_new_one(call, tmp_path, monkeypatch):
    path = tmp_path / 'pointer'
    disk.replace_text(path, 'old')
    monkeypatch.setattr(disk, 'os', FaultyOs(call, fail(errno.ENOSPC)))
    with pytest.raises(OSError, match='No space left'):
        disk.replace_text(path, 'new')
    monkeypatch.undo()
    assert path.read_text() in ('old', 'new')
    (tmp_path / 'pointer.tmp').write_text('of a process that was killed')
    disk.replace_text(path, 'newer')
    assert path.read_text() == 'newer'
    assert [file.name for file in tmp_path.iterdir()] == ['pointer']


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert disk.free_bytes(tmp_path / 'not' / 'yet') == pytest.approx(disk.free_bytes(tmp_path), rel=0.1)
