"""Tensor files are those of safetensors, to the byte of every value."""

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmtune.utils import disk
from vlmtune.utils.tensor_file import TensorLayout, layout_of, write_tensors

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    'matrix': torch.randn(3, 5, generator=GENERATOR),
    'bfloat16': torch.randn(7, generator=GENERATOR).bfloat16(),
    'half': torch.randn(2, 2, generator=GENERATOR).half(),
    'double': torch.randn(1, generator=GENERATOR).double(),
    'number': torch.tensor(3.5),
    'empty': torch.zeros(0, 4),
    'bytes': torch.arange(11, dtype=torch.uint8),
    'long': torch.tensor([-(2**60), 7]),
    'int': torch.tensor([[1], [2]], dtype=torch.int32),
    'bool': torch.tensor([True, False, True]),
    'float8': torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    'not finite': torch.tensor([float('nan'), float('inf'), -0.0]),
    'transposed': torch.arange(6.0).reshape(2, 3).t(),
    'trained': torch.nn.Parameter(torch.ones(2)),
    'name "quoted" ünïcode': torch.ones(1),
}


def write(path, tensors, **options):
    return write_tensors(path, tensors.items(), layout={n: layout_of(t) for n, t in tensors.items()}, **options)


def same(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.detach().contiguous().flatten().view(torch.uint8)
    )


def test_the_library_reads_what_was_written(tmp_path):
    written = write(tmp_path / 'a', TENSORS, metadata=dict(format='pt', more='ä'))
    found = load_file(tmp_path / 'a')
    assert found.keys() == TENSORS.keys()
    assert [name for name in found if not same(found[name], TENSORS[name])] == []
    with safe_open(tmp_path / 'a', framework='pt') as file:
        assert file.metadata() == dict(format='pt', more='ä')
    assert (written.size, written.sha256) == (
        (tmp_path / 'a').stat().st_size,
        hashlib.sha256((tmp_path / 'a').read_bytes()).hexdigest(),
    )


def test_as_large_as_the_librarys_own(tmp_path):
    tensors = {name: tensor.detach().contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / 'theirs')
    assert abs(write(tmp_path / 'ours', tensors).size - (tmp_path / 'theirs').stat().st_size) < 200


def test_no_tensors_at_all(tmp_path):
    write(tmp_path / 'a', {}, metadata=dict(a='b'))
    assert load_file(tmp_path / 'a') == {}
    write(tmp_path / 'b', {})
    assert load_file(tmp_path / 'b') == {}


def test_values_are_aligned(tmp_path):
    write(tmp_path / 'a', {'x': torch.ones(3)})
    length = int.from_bytes((tmp_path / 'a').read_bytes()[:8], 'little')
    assert length % 8 == 0
    json.loads((tmp_path / 'a').read_bytes()[8 : 8 + length])


def test_one_tensor_at_a_time_is_asked_for(tmp_path):
    asked = []

    def tensors():
        for name in 'ab':
            asked.append((name, (tmp_path / 'x').stat().st_size))
            yield name, torch.ones(1 << 20)

    write_tensors(tmp_path / 'x', tensors(), layout=dict.fromkeys('ab', TensorLayout(torch.float32, (1 << 20,))))
    assert asked[1][1] - asked[0][1] == 4 << 20  # the first is on the disk when the second is made


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        ([('a', torch.ones(2)), ('c', torch.ones(2))], 'c .* came where .*b'),
        ([('a', torch.ones(2)), ('b', torch.ones(3))], r'b .*\(3,\).* came where'),
        ([('a', torch.ones(2)), ('b', torch.ones(2).half())], 'float16.* came where'),
        ([('a', torch.ones(2))], 'b was announced and did not come'),
        ([('a', torch.ones(2)), ('b', torch.ones(2)), ('c', torch.ones(2))], 'c .* came where None'),
    ],
)
def test_other_tensors_than_announced_are_an_error(tensors, message, tmp_path):
    layout = dict.fromkeys('ab', TensorLayout(torch.float32, (2,)))
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / 'a', tensors, layout=layout)


@pytest.mark.parametrize(('call', 'at'), [('open', 0), ('write', 0), ('write', 1), ('write', 4), ('fsync', 0)])
def test_a_full_disk_is_an_oserror_and_nothing_else(call, at, tmp_path, monkeypatch):
    class FullDisk:
        calls = 0

        def __getattr__(self, name):
            return self.go if name == call else getattr(os, name)

        def go(self, *args):
            self.calls += 1
            if self.calls > at:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return getattr(os, call)(*args)

    monkeypatch.setattr(disk, 'os', FullDisk())
    with pytest.raises(OSError, match='No space left on device') as caught:
        write(tmp_path / 'a', TENSORS)
    assert caught.value.errno == errno.ENOSPC
