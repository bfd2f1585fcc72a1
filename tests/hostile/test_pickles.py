"""Pickles under every name that a program of this field gives them. What they hold is never run.

Elsewhere: ``meta.config`` of an mmengine checkpoint that would end the process, tests/engine/test_foreign_weights.py.
"""

import builtins
import functools
import operator
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile

import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch.distributed.checkpoint import save as save_distributed

from vlmtune.apps.chat import chat
from vlmtune.apps.train import train
from vlmtune.utils import safe_torch
from vlmtune.utils.errors import CheckpointError


class Payload:
    """An object whose pickle calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
GETATTR = b'c__builtin__\ngetattr\n'


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


# Written by hand: these name nothing but what an honest checkpoint names.
BY_HAND = {
    'the state of the class': HISTORY + b'}' + text('_statistics_methods') + b'}sb',
    'methods of the class replaced': GETATTR + HISTORY + text('_statistics_methods') + b'\x86R'
    + text('mean') + HISTORY + b's',
    'a method of the class called': GETATTR + HISTORY + text('mean') + b'\x86R)R',
    'from getattr to the globals': GETATTR + GETATTR + GETATTR + HISTORY + text('mean') + b'\x86R'
    + text('__globals__') + b'\x86R' + text('__builtins__') + b'\x86R)R',
    'the slots of an object': HISTORY + b')\x81N}' + text('__class__') + HISTORY + b's\x86b' + b')R',
    'getattr on what is no stub': GETATTR + b'ctorch\nSize\n' + text('__module__') + b'\x86R)R',
    'a storage of 10^12 values': b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu')
    + b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'tQ',
    'lists in lists': b']' * 20_000 + b'a' * 19_999,
    'a tuple of tuples of tuples': b')' + b'q\x00h\x00\x86' * 60,
    'a dict that is its own key': b'}q\x00h\x00h\x00s',
    'an encoding over again': b''.join((b'c_codecs\nencode\n', text('a' * 1000), text('latin1'), b'\x86Rq\x00'))
    + b'c_codecs\nencode\nh\x00' + text('hex') + b'\x86R',
    'a text of 4 GB that is not there': b'X\xff\xff\xff\xff',
    'an opcode of another protocol': b'\x93',
    'nothing on the stack': b'0R',
    'no end': b']',
}  # fmt: skip


def torch_zip(path, pickled, **options):
    with zipfile.ZipFile(path, 'w', **options) as archive:
        archive.writestr('archive/data.pkl', pickled)
        archive.writestr('archive/version', '3\n')
        archive.writestr('archive/data/0', bytes(64))


def torch_raw(path, pickled):
    sizes = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    head = [torch.serialization.MAGIC_NUMBER, 1001, sizes]
    with path.open('wb') as file:
        for value in head:
            pickle.dump(value, file, protocol=2)
        file.write(pickled)
        pickle.dump([], file, protocol=2)


@pytest.fixture
def start_from(recipe, tmp_path):
    """``vlmtune train CONFIG --cfg-options load_from=PATH``."""

    def go(path):
        train(recipe(), work_dir=str(tmp_path / 'work'), overrides=dict(load_from=str(path)))

    return go


def payloads(touch):
    """What a file of torch.save may hold in place of a tensor."""
    evil = dict(
        system=Payload(os.system, touch),
        popen=Payload(subprocess.Popen, touch.split()),
        evaluated=Payload(eval, f'__import__("os").system("{touch}")'),
        executed=Payload(builtins.exec, f'import os; os.system("{touch}")'),
        imported=Payload(__import__, 'antigravity'),
        partial=functools.partial(os.system, touch),
        attribute=operator.attrgetter('system'),
        bytes=Payload(bytearray, 10**11),
        tensor=Payload(torch.FloatTensor, 10**12),
        meta=torch.empty(10**12, device='meta'),
        sparse=torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
        expanded=torch.ones(1).expand(10**12),
    )
    poisoned = HistoryBuffer([0.5], [1])
    poisoned.__dict__['_statistics_methods'] = dict(mean=evil['system'])
    return evil | dict(history=poisoned)


NAMES = list(payloads('touch x'))


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'raw'])
@pytest.mark.parametrize('name', NAMES)
def test_a_checkpoint_that_calls(name, zipped, touch, start_from, refused, tmp_path):
    content = dict(state_dict={'a': torch.ones(2)}, message_hub=payloads(touch)[name])
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    with refused('is not read: a (pickle|tensor)', CheckpointError):
        start_from(tmp_path / 'x.pth')


def test_a_checkpoint_inside_a_checkpoint(touch, start_from, refused, tmp_path):
    torch.save(Payload(os.system, touch), tmp_path / 'inner.pth')
    torch.save(Payload(torch.load, str(tmp_path / 'inner.pth')), tmp_path / 'x.pth')
    with refused('names torch.serialization.load', CheckpointError):
        start_from(tmp_path / 'x.pth')


GROWING = ('an encoding over again', 'a tuple of tuples of tuples', 'lists in lists')


@pytest.mark.parametrize('write', [torch_zip, torch_raw])
@pytest.mark.parametrize(
    ('name', 'scanned'),
    [(name, scanned) for name in BY_HAND for scanned in ((True,) if name in GROWING else (True, False))],
)
def test_a_pickle_written_by_hand(name, scanned, write, refused, monkeypatch, tmp_path):
    """Also without the first line of defence; what only grows is harmless at this size: only that line bounds it."""
    write(tmp_path / 'x.pth', b'\x80\x02' + BY_HAND[name] + b'.')
    methods = dict(HistoryBuffer._statistics_methods)
    if not scanned:
        monkeypatch.setattr(safe_torch, 'check_legacy', lambda path: None)
    try:
        with refused(None, CheckpointError):
            value = safe_torch.legacy_weights(tmp_path / 'x.pth')
            pytest.fail(f'loaded {value}')
    finally:
        assert HistoryBuffer._statistics_methods == methods


@pytest.mark.parametrize('write', [torch_zip, torch_raw])
def test_an_alias_of_getattr_gets_nothing(write, tmp_path):
    """Checkpoints of mmengine mention it; here it is a name for a class without attributes."""
    got = GETATTR + b'ctorch\nSize\n' + text('__module__') + b'\x86R'
    write(tmp_path / 'x.pth', b'\x80\x02}' + text('got') + got + b's.')
    assert safe_torch.load_legacy(tmp_path / 'x.pth') == {'got': None}


@pytest.mark.parametrize('write', [torch_zip, torch_raw])
def test_a_claim_of_memory_is_compared_with_the_file(write, refused, start_from, tmp_path):
    write(tmp_path / 'x.pth', b'\x80\x02' + BY_HAND['a storage of 10^12 values'] + b'.')
    with refused('a tensor of 1,000,000,000,000 values in a file of', CheckpointError):
        start_from(tmp_path / 'x.pth')


def test_archives_that_grow(refused, start_from, tmp_path):
    torch_zip(tmp_path / 'packed.pth', b'\x80\x02' + text('a' * 10**8) + b'.', compression=zipfile.ZIP_DEFLATED)
    with refused('compressed or overlapping', CheckpointError):
        start_from(tmp_path / 'packed.pth')
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / 'program.pt'))
    with refused('is not read: ', CheckpointError):
        start_from(tmp_path / 'program.pt')


def test_a_tar_that_leads_out(refused, start_from, tmp_path):
    """The oldest format of torch; its loader unpacks files."""
    with tarfile.open(tmp_path / 'x.pth', 'w') as archive:
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    with refused('older than 0.2', CheckpointError):
        start_from(tmp_path / 'x.pth')


def test_metadata_of_a_distributed_checkpoint(refused, start_from, touch, tmp_path):
    save_distributed({'a': torch.ones(2)}, checkpoint_id=tmp_path / 'dcp', no_dist=True)
    shutil.copy(tmp_path / 'dcp' / '.metadata', tmp_path / 'metadata.pth')
    with refused('is not read: a pickle', CheckpointError):
        start_from(tmp_path / 'metadata.pth')
    (tmp_path / 'dcp' / '.metadata').write_bytes(pickle.dumps(Payload(os.system, touch)))
    with refused('holds nothing that can be loaded', CheckpointError):
        start_from(tmp_path / 'dcp')


@pytest.mark.parametrize('below', ['', 'global_step5'])
def test_a_file_of_deepspeed(below, refused, start_from, touch, tmp_path):
    folder = tmp_path / 'ds' / below
    folder.mkdir(parents=True)
    if below:
        (tmp_path / 'ds' / 'latest').write_text('../../../ds/global_step5\n')
    torch.save(dict(module={}, ds_config=Payload(os.system, touch)), folder / 'mp_rank_00_model_states.pt')
    with refused('names posix.system', CheckpointError):
        start_from(tmp_path / 'ds')


@pytest.mark.parametrize('name', ['system', 'bytes', 'expanded'])
def test_a_model_whose_weights_are_a_pickle(name, touch, tiny_model, refused, tmp_path, start_from):
    """As the base model of a chat, and of ``load_from``."""
    folder = shutil.copytree(tiny_model('qwen2'), tmp_path / 'model')
    (folder / 'model.safetensors').unlink()
    torch.save({'model.norm.weight': payloads(touch)[name]}, folder / 'pytorch_model.bin')
    with refused():
        chat(str(folder), prompt='hello')
    with refused('no .*safetensors; models in other formats are not read'):
        start_from(folder)
