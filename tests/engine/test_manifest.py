"""A checkpoint whose manifest holds is the one that was written; what is broken, foreign or hostile is named."""

import json
import os

import pytest

from vlmtune.engine.manifest import MANIFEST, manifest_text, verify
from vlmtune.utils.disk import hash_file, write_file
from vlmtune.utils.errors import CheckpointError

FILES = {'model.safetensors': b'weights' * 100, 'trainer.json': b'{}', 'processor/tokenizer.json': b'{"a": 1}'}
META = dict(iteration=1, world_size=1, resumable=True)


@pytest.fixture
def target(tmp_path):
    path = tmp_path / 'iter_1.pth'
    files = {name: write_file(path / name, [data]) for name, data in FILES.items()}
    (path / MANIFEST).write_text(manifest_text(files, saved_at=1.5, meta=META))
    return path


def edit(target, **changes):
    path = target / MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def test_what_was_written_holds(target):
    manifest = verify(target)
    assert {name: manifest[name] for name in META} == META
    assert {name: entry['size'] for name, entry in manifest['files'].items()} == {n: len(d) for n, d in FILES.items()}
    assert manifest['version'] == 2


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('missing', 'iter_1.pth: trainer.json is missing'),
        ('changed', r'model.safetensors was changed or damaged \(sha256 differs\)'),
        ('truncated', 'model.safetensors has 5 bytes, expected 700'),
        ('no manifest', 'has no manifest.json: it was not finished, or vlmtune did not write it'),
        ('half manifest', r'manifest.json is not valid json'),
    ],
)
def test_damage_is_named(kind, message, target, damage):
    damage(target, kind)
    with pytest.raises(CheckpointError, match=message):
        verify(target)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(format='other'), 'does not describe a vlmtune checkpoint'),
        (dict(version=1), 'has format version 1, this vlmtune reads 2'),
        (dict(files=...), 'was changed: it lacks what vlmtune writes into it'),
        (dict(files={'a': 1}), 'was changed: it lacks what vlmtune writes into it'),
        (dict(world_size=...), 'was changed: it lacks what vlmtune writes into it'),
    ],
)
def test_a_manifest_that_was_changed_is_named(changes, message, target):
    edit(target, **changes)
    with pytest.raises(CheckpointError, match=message):
        verify(target)


def test_what_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r'/.*/iter_1.pth does not exist'):
        verify(tmp_path / 'iter_1.pth')
    (tmp_path / 'iter_1.pth').write_bytes(b'pickle')
    with pytest.raises(CheckpointError, match=r'is a file; expected the directory iter_N.pth'):
        verify(tmp_path / 'iter_1.pth')


def test_sizes_alone_do_not_see_a_changed_byte(target, damage):
    damage(target, 'changed')
    verify(target, hashes=False)


# ---- manifests that somebody made up


def entry_of(path):
    return dict(size=path.stat().st_size, sha256=hash_file(path))


@pytest.mark.parametrize(
    'name',
    ['../secret', '/etc/hostname', 'processor/../../secret', './secret', '.', '..', '', 'a//b', 'a/', 'a\0b', '/'],
)
def test_no_name_leads_outside(name, target, tmp_path):
    (tmp_path / 'secret').write_text('secret')
    edit(target, files={name: entry_of(tmp_path / 'secret')})
    with pytest.raises(CheckpointError, match='manifest.json was changed: .* is no name of a file in it'):
        verify(target)


@pytest.mark.parametrize('name', ['secret', 'processor'])
def test_no_link_leads_outside(name, target, tmp_path):
    """Also where the file behind it has the size and the hash that the manifest says."""
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'tokenizer.json').write_bytes(FILES['processor/tokenizer.json'])
    if name == 'secret':
        (target / name).symlink_to(outside / 'tokenizer.json')
        edit(target, files={name: entry_of(outside / 'tokenizer.json')})
    else:
        (target / 'processor').rename(tmp_path / 'aside')
        (target / 'processor').symlink_to(outside)
    with pytest.raises(CheckpointError, match='is a link; vlmtune writes none'):
        verify(target)


def test_a_link_to_a_whole_checkpoint_is_what_the_user_chose(target, tmp_path):
    (tmp_path / 'best').symlink_to(target)
    verify(tmp_path / 'best')


@pytest.mark.parametrize('name', [MANIFEST, 'trainer.json'])
@pytest.mark.parametrize('kind', ['pipe', 'directory', 'link'])
def test_what_is_no_file_is_not_opened(name, kind, target, tmp_path):
    content = (target / name).read_bytes()
    (target / name).unlink()
    if kind == 'pipe':
        os.mkfifo(target / name)  # whoever opens it waits for ever
    elif kind == 'directory':
        (target / name).mkdir()
    else:
        (tmp_path / 'elsewhere').write_bytes(content)
        (target / name).symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(CheckpointError, match='no regular file|is a link'):
        verify(target)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'{"format": ' * 200_000, 'is not valid json|nested deeper'),
        (b'[' * 200_000 + b']' * 200_000, 'nested deeper|not valid json'),
        (b'{"size": ' + b'9' * 5000 + b'}', 'not valid json'),
        (b'\xff\xfe\x00', 'not valid json'),
        (b'', 'not valid json'),
        (b'null', 'does not describe a vlmtune checkpoint'),
        (b'[]', 'does not describe a vlmtune checkpoint'),
        (b' ' * (1 << 24) + b'{}', 'has 16777218 bytes, expected 16777216 at most'),
    ],
)
def test_text_that_is_no_manifest(text, message, target):
    (target / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        verify(target)


@pytest.mark.parametrize(
    'changes',
    [
        dict(iteration='1'), dict(iteration=True), dict(iteration=-1), dict(iteration=10**30), dict(iteration=1.5),
        dict(world_size=None), dict(resumable=1), dict(saved_at='now'), dict(saved_at=float('nan')),
        dict(saved_at=float('inf')), dict(saved_at=10**400), dict(files=[]), dict(files={'a': dict(size=1)}),
        dict(files={'a': dict(size=-1, sha256='0' * 64)}), dict(files={'a': dict(size=True, sha256='0' * 64)}),
        dict(files={'a': dict(size=1, sha256='0' * 63)}), dict(files={'a': dict(size=1, sha256=5)}),
    ],
)  # fmt: skip
def test_values_that_vlmtune_never_writes(changes, target):
    edit(target, **changes)
    with pytest.raises(CheckpointError, match='was changed: it lacks what vlmtune writes into it'):
        verify(target)


def test_a_name_that_no_file_system_takes(target):
    edit(target, files={'x' * 5000: dict(size=1, sha256='0' * 64)})
    with pytest.raises(CheckpointError, match='cannot be read: File name too long') as caught:
        verify(target)
    assert len(str(caught.value)) < 1000


def test_the_first_broken_file_is_named_though_several_are_read_at_once(target):
    for name, data in FILES.items():
        (target / name).write_bytes(bytes(reversed(data)))
    with pytest.raises(CheckpointError, match='model.safetensors was changed or damaged'):
        verify(target)
