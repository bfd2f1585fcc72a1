"""An export goes to a hub: one of this machine, that speaks the protocol of the real one."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from vlmtune.apps.export.push import push
from vlmtune.cli import main
from vlmtune.testing.fake_hub import fake_hub
from vlmtune.utils import hub as hubs
from vlmtune.utils.errors import CheckpointError, ConfigError

KEY = 'hf_' + 'k' * 24


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub(tmp_path / 'hub', key=KEY) as server:
        for name, value in server.constants(tmp_path / 'cache').items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', KEY)
        hubs.hub_answers.cache_clear()
        yield server
    hubs.hub_answers.cache_clear()


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / 'merged'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'config.json').write_text('{"model_type": "llava"}')
    (folder / 'README.md').write_text('# card')
    (folder / 'sub' / 'more.json').write_text('{}')
    (folder / 'model.safetensors').write_bytes(bytes(range(256)) * 20)
    (folder / '.hidden').write_text('of git')
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def test_every_file_arrives_and_hidden_ones_stay(hub, export, capsys):
    assert main(['push', str(export), 'me/squares']) == 0
    sent = files(export)
    del sent['.hidden']
    assert files(hub.root / 'me' / 'squares') == sent
    assert capsys.readouterr().out == f'{hub.address}/me/squares\n'
    assert not hub.private
    (export / 'README.md').write_text('# another card')
    push(str(export), 'me/squares')  # once more, over the first
    assert (hub.root / 'me' / 'squares' / 'README.md').read_text() == '# another card'


def test_a_private_repository_is_private_and_a_public_one_refused(hub, export):
    push(str(export), 'me/secret', private=True)
    assert hub.private == {'me/secret'}
    push(str(export), 'me/secret', private=True)
    push(str(export), 'me/open')
    (export / 'README.md').write_text('not for everybody')
    with pytest.raises(ConfigError, match='push --private: me/open is there and public'):
        push(str(export), 'me/open', private=True)
    assert (hub.root / 'me' / 'open' / 'README.md').read_text() == '# card'


def test_a_wrong_key_is_one_line_that_does_not_show_it(hub, export, monkeypatch, capsys, caplog):
    wrong = 'hf_' + 'wrongWRONG' * 3
    monkeypatch.setenv('HF_TOKEN', wrong)
    with caplog.at_level(logging.DEBUG):
        assert main(['push', str(export), 'me/squares']) == 1
    told = capsys.readouterr()
    assert told.err.startswith('error: push to me/squares: 401')
    assert 'Invalid credentials' in told.err
    assert told.err.count('\n') == 1
    assert wrong not in told.out + told.err + caplog.text
    assert not (hub.root / 'me').exists()


def test_no_key(hub, export, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(ConfigError, match='push needs a key of the hub; log in with `hf auth login`, or set HF_TOKEN'):
        push(str(export), 'me/squares')
    assert hub.asked == []


def test_a_hub_that_is_not_there(hub, export, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    hubs.hub_answers.cache_clear()
    with pytest.raises(ConfigError, match=r'push to me/squares: the hub http://127.0.0.1:9 cannot be reached'):
        push(str(export), 'me/squares')


@pytest.mark.parametrize('name', ['squares', 'me/', 'a/b/c', '/me'])
def test_a_name_that_is_no_repository(export, name):
    with pytest.raises(ConfigError, match='expected a repository, org/name'):
        push(str(export), name)


def test_a_folder_that_is_no_export(export, tmp_path):
    for path, message in (
        (tmp_path / 'none', 'is no folder'),
        (tmp_path, 'has neither config.json nor adapter_config'),
    ):
        with pytest.raises(CheckpointError, match=message):
            push(str(path), 'me/squares')
    (export / 'manifest.json').write_text('{}')
    with pytest.raises(CheckpointError, match='is a checkpoint; write it first: vlmtune convert pth_to_hf'):
        push(str(export), 'me/squares')


def test_what_should_not_be_published(hub, export, tmp_path):
    (tmp_path / 'diary.txt').write_text('dear diary')
    (export / 'notes.txt').symlink_to(tmp_path / 'diary.txt')
    with pytest.raises(CheckpointError, match='notes.txt is a link out of the folder'):
        push(str(export), 'me/squares')
    (export / 'notes.txt').unlink()
    (export / 'README.md').write_text('wandb at https://user:passw0rd@tracker.example.org/')
    with pytest.raises(CheckpointError, match='README.md holds what looks like a secret') as error:
        push(str(export), 'me/squares')
    assert 'passw0rd' not in str(error.value)
    assert hub.asked == []


def test_an_adapter_of_a_local_base_says_so(hub, tmp_path, caplog):
    folder = tmp_path / 'adapter'
    folder.mkdir()
    settings = dict(peft_type='LORA', base_model_name_or_path='/models/mine')
    (folder / 'adapter_config.json').write_text(json.dumps(settings))
    push(str(folder), 'me/adapter')
    assert 'names /models/mine as its base model, a folder of this machine' in caplog.text
    assert (hub.root / 'me' / 'adapter' / 'adapter_config.json').is_file()


# ---- ModelScope: its client is an optional package, whose calls are what is tested here


class ModelScope:
    """What of the client is used."""

    HubError, NetworkError = OSError, ConnectionError
    Visibility = SimpleNamespace(PRIVATE=1, PUBLIC=5)

    def __init__(self):
        self.repositories, self.uploads, self.key = {}, [], 'ms-0123456789'

    def HubApi(self):
        return self

    def get_default_config(self):
        return SimpleNamespace(endpoint='https://scope.example', token=self.key)

    def repo_exists(self, name, kind):
        return name in self.repositories

    def create_repo(self, name, kind, *, visibility):
        self.repositories[name] = visibility

    def get_repo(self, name, kind):
        return SimpleNamespace(visibility=self.repositories[name])

    def upload_folder(self, name, kind, folder, **options):
        self.uploads.append((name, kind, folder, options))


def test_to_modelscope(export, monkeypatch, capsys):
    scope = ModelScope()
    monkeypatch.setitem(sys.modules, 'modelscope_hub', scope)
    assert main(['push', str(export), 'me/squares', '--to', 'modelscope', '--private']) == 0
    assert capsys.readouterr().out == 'https://scope.example/models/me/squares\n'
    assert scope.repositories == {'me/squares': 1}
    ((name, kind, folder, options),) = scope.uploads
    assert (name, kind, folder) == ('me/squares', 'model', export)
    assert '.*' in options['ignore_patterns']
    assert options['use_cache'] is False
    scope.repositories['me/squares'] = 5
    with pytest.raises(ConfigError, match='me/squares is there and public'):
        push(str(export), 'me/squares', private=True, to='modelscope')
    push(str(export), 'me/squares', to='modelscope')
    assert len(scope.uploads) == 2
    scope.key = None
    with pytest.raises(ConfigError, match='push needs a key of ModelScope'):
        push(str(export), 'me/squares', to='modelscope')


def test_a_failure_of_modelscope_is_one_line_without_the_key(export, monkeypatch):
    scope = ModelScope()
    monkeypatch.setitem(sys.modules, 'modelscope_hub', scope)
    monkeypatch.setattr(scope, 'create_repo', lambda *args, **kwargs: _fail(f'refused {scope.key}\nby the server'))
    with pytest.raises(ConfigError, match='^push to me/squares: refused <secret removed>$'):
        push(str(export), 'me/squares', to='modelscope')


def _fail(message):
    raise OSError(message)


def test_without_the_client_of_modelscope(export, monkeypatch):
    monkeypatch.setitem(sys.modules, 'modelscope_hub', None)
    with pytest.raises(ConfigError, match=r"push --to modelscope needs .*; pip install 'vlmtune\[modelscope\]'$"):
        push(str(export), 'me/squares', to='modelscope')
