"""A checkpoint of ours that a stranger has rewritten, hashes and all: ``--resume PATH`` refuses it in one line.

Elsewhere: manifests and files that are damaged, tests/engine/test_checkpoint.py and test_manifest.py.
"""

import hashlib
import json
import shutil

import pytest

from vlmtune.apps.train import train
from vlmtune.utils.errors import CheckpointError

HUGE = 10**400


@pytest.fixture(scope='module')
def saved(tiny_model, tmp_path_factory):
    """A work dir with a checkpoint after one of three steps."""
    return {}


@pytest.fixture
def resume(recipe, saved, tmp_path, tmp_path_factory):
    """``resume(change)`` lets ``change`` rewrite a copy of the checkpoint, signs it anew, and resumes from it."""
    if not saved:
        folder = tmp_path_factory.mktemp('saved')
        config = folder / 'recipe.py'
        shutil.copy(recipe(data=_rows(folder)), config)
        train(str(config), work_dir=str(folder / 'work'), overrides=dict(max_steps=1))
        saved.update(config=str(config), checkpoint=folder / 'work' / 'iter_1.pth')

    def go(change, *, sign=True):
        path = shutil.copytree(saved['checkpoint'], tmp_path / 'work' / 'iter_1.pth')
        change(path)
        if sign:
            _sign(path)
        train(saved['config'], work_dir=str(tmp_path / 'work'), resume=str(path), overrides=dict(max_steps=2))

    return go


def _rows(folder):
    rows = [
        {'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b' * i}]} for i in range(1, 9)
    ]
    (folder / 'rows.json').write_text(json.dumps(rows))
    return folder / 'rows.json'


def _sign(path):
    manifest = json.loads((path / 'manifest.json').read_text())
    for name, entry in manifest['files'].items():
        data = (path / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (path / 'manifest.json').write_text(json.dumps(manifest))


def put(name, keys, value):
    """A change of one value of a JSON file."""

    def change(path):
        content = json.loads((path / name).read_text())
        at = content
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        (path / name).write_text(json.dumps(content))

    return change


CHANGES = {
    **{
        f'{".".join(map(str, keys))} is {str(value)[:20]}': put('trainer.json', keys, value)
        for keys in (['iteration'], ['sampler'], ['schedulers'], ['messages'], ['packs_per_step'], ['scaler'])
        for value in ('../../x', HUGE, -1, [[]], {'a': {}})
    },
    **{
        f'rng {key} is {str(value)[:20]}': put('rng_0.json', [key], value)
        for key in ('torch', 'numpy', 'python')
        for value in ('x', HUGE, [HUGE], [])
    },
    'JSON nested deep': lambda path: (path / 'trainer.json').write_text('[' * 10**6),
    'JSON of digits': lambda path: (path / 'trainer.json').write_text('{"iteration": ' + '9' * 10**6 + '}'),
    'a config that runs': lambda path: (path / 'config.py').write_text('import os; os._exit(3)'),
    'a name that leads out': put('manifest.json', ['files', '../../../etc/passwd'], dict(size=1, sha256='0' * 64)),
}  # fmt: skip


def test_what_was_not_changed_is_resumed(resume):
    resume(lambda path: None)


@pytest.mark.parametrize('name', CHANGES)
def test_values_that_no_run_writes(name, resume, harmless):
    with harmless():
        resume(CHANGES[name], sign='leads out' not in name)


@pytest.mark.parametrize('value', [-5, 10**30, '1', 1.0])
def test_another_iteration_than_that_of_the_manifest(value, resume, refused):
    with refused(r'trainer\.json was changed: iteration .*, the manifest says 1$', error=CheckpointError):
        resume(put('trainer.json', ['iteration'], value))


@pytest.mark.parametrize('value', [0, -1, '1', None])
def test_packs_per_step_that_no_run_has(value, resume, refused):
    with refused(r'trainer\.json was changed: packs_per_step', error=CheckpointError):
        resume(put('trainer.json', ['packs_per_step'], value))


def test_a_link_in_the_place_of_a_file(resume, refused, tmp_path):
    (tmp_path / 'elsewhere').write_text('{}')

    def link(path):
        (path / 'trainer.json').unlink()
        (path / 'trainer.json').symlink_to(tmp_path / 'elsewhere')

    with refused(error=CheckpointError):
        resume(link, sign=False)
