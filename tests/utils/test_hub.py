"""Names of hubs: mirrors, a hub that does not answer, ModelScope."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from vlmtune.apps.export.adapters import find_adapter
from vlmtune.data import load_rows
from vlmtune.layouts import read_config
from vlmtune.models import load_model
from vlmtune.testing.fake_hub import fake_hub
from vlmtune.utils import hub as hubs
from vlmtune.utils.errors import ConfigError, DataError, ModelError, UserError
from vlmtune.utils.pretrained import find_folder, load_pretrained, read_source_json


@pytest.fixture(autouse=True)
def asked_anew():
    hubs.hub_answers.cache_clear()
    hubs.modelscope_folder.cache_clear()
    yield
    hubs.hub_answers.cache_clear()
    hubs.modelscope_folder.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_model):
    with fake_hub(tmp_path / 'hub') as server:
        for name, value in server.constants(tmp_path / 'cache').items():
            monkeypatch.setattr(constants, name, value)
        (server.root / 'me').mkdir()
        (server.root / 'me' / 'tiny').symlink_to(tiny_model('llama'))
        yield server


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)


@pytest.fixture
def knocks(monkeypatch):
    """Each attempt to connect to a server."""
    seen, connect = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, 'connect', lambda self, to: (seen.append(to), connect(self, to))[1])
    return seen


# ---- a mirror


def test_a_mirror_is_asked_for_everything(hub):
    assert hubs.hub_answers()
    assert read_config('me/tiny').model_type == 'llama'
    assert load_model('me/tiny')[1].model_type == 'llama'
    assert (find_folder('me/tiny') / 'tokenizer.json').is_file()
    assert read_source_json('me/tiny', 'none.json') is None
    assert any(line.endswith('/me/tiny/resolve/main/config.json') for line in hub.asked)


def test_what_was_downloaded_is_there_when_the_hub_is_not(hub, monkeypatch, knocks):
    load_model('me/tiny')
    load_pretrained(AutoTokenizer, 'me/tiny')
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    hubs.hub_answers.cache_clear()
    knocks.clear()
    assert load_model('me/tiny')[1].model_type == 'llama'
    assert load_pretrained(AutoTokenizer, 'me/tiny').eos_token
    assert knocks == [('127.0.0.1', 9)]


def test_a_model_that_is_cached_at_one_commit_only(hub, monkeypatch):
    commit = '0' * 39 + '1'
    read_config('me/tiny', revision=commit)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    hubs.hub_answers.cache_clear()
    assert read_config('me/tiny', revision=commit).model_type == 'llama'
    with pytest.raises(ModelError, match='as a hub id it is not in the cache, and HF_HUB_OFFLINE is set'):
        read_config('me/tiny')


@pytest.mark.slow
def test_the_variable_of_a_mirror(hub):
    code = 'from vlmtune.layouts import read_config; print(read_config("me/tiny").model_type)'
    environment = {**os.environ, 'HF_ENDPOINT': hub.address, 'HF_HOME': str(hub.root / 'home')}
    run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout == 'llama\n', run.stderr


# ---- a hub that does not answer


@pytest.mark.parametrize('load', [read_config, find_folder, load_model, find_adapter])
def test_a_hub_that_does_not_answer_is_one_line_and_asked_once(no_hub, load, knocks):
    with pytest.raises(UserError, match=r'models/mine: .*the hub http://127.0.0.1:9 cannot be reached') as error:
        load('models/mine')
    assert knocks == [('127.0.0.1', 9)]
    assert '\n' not in str(error.value)


def test_rows_of_a_hub_that_does_not_answer(no_hub, knocks):
    with pytest.raises(
        DataError, match=r'there is no file /.*/me/rows, .* is not in the cache, and the hub .* reached'
    ):
        load_rows('me/rows')
    assert knocks == [('127.0.0.1', 9)]


def test_a_hub_that_must_not_be_asked(no_hub, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ModelError, match='HF_HUB_OFFLINE is set, so the hub was not asked'):
        read_config('models/mine')


@pytest.mark.parametrize('name', ['~/gone', './gone', '../gone', '/gone', 'gone', 'gone/', 'runs/1/gone'])
def test_a_path_that_is_gone_is_no_hub_id(name, no_hub, knocks):
    assert not hubs.looks_like_id(name)
    with pytest.raises(ModelError, match='no model at /'):
        read_config(name)
    with pytest.raises(UserError, match='no adapter at '):
        find_adapter(name)
    assert knocks == []
    assert hubs.looks_like_id('models/gone')


def test_a_name_that_is_none(no_hub):
    with pytest.raises(ModelError, match=r'my model/is here is neither a folder nor a hub id: .*'):
        read_config('my model/is here')


# ---- ModelScope


class Scope:
    """A client of ModelScope whose repositories are folders."""

    class HubError(Exception):
        pass

    class NetworkError(HubError):
        pass

    def __init__(self, folders: dict[str, Path]):
        self.folders, self.asked, self.is_down = folders, [], False

    def HubApi(self):
        return SimpleNamespace(download_repo=self.download)

    def download(self, name, kind, *, revision, allow_patterns, local_files_only=False):
        self.asked.append((name, kind, revision, allow_patterns))
        if self.is_down and not local_files_only:
            raise self.NetworkError('no\nnetwork')
        if name not in self.folders:
            raise self.HubError(f'no {name}\nat all')
        return self.folders[name]


@pytest.fixture
def scope(monkeypatch, tiny_model, tiny_data):
    rows = tiny_data('openai').data_path
    found = Scope({'me/tiny': tiny_model('llama'), 'me/rows': rows.parent})
    monkeypatch.setitem(sys.modules, 'modelscope_hub', found)
    return found


def test_a_model_of_modelscope(scope, no_hub):
    assert read_config('modelscope://me/tiny').model_type == 'llama'
    assert scope.asked == [('me/tiny', 'model', None, ['*.json', '*.jinja', '*.model', '*.txt'])]
    assert load_model('modelscope://me/tiny')[1].model_type == 'llama'
    assert scope.asked[1:] == [('me/tiny', 'model', None, None)]
    assert find_folder('modelscope://me/tiny') == scope.folders['me/tiny']


def test_rows_of_modelscope(scope):
    assert len(load_rows('modelscope://me/rows/data.jsonl')) == 8
    assert scope.asked == [('me/rows', 'dataset', None, ['data.jsonl'])]
    with pytest.raises(DataError, match='the repository has no none.jsonl'):
        load_rows('modelscope://me/rows/none.jsonl')
    with pytest.raises(DataError, match='modelscope://me/gone cannot be had from ModelScope: no me/gone$'):
        load_rows('modelscope://me/gone')


def test_without_network_what_was_downloaded_will_do(scope):
    scope.is_down = True
    assert read_config('modelscope://me/tiny').model_type == 'llama'
    with pytest.raises(ModelError, match='modelscope://me/gone cannot be had from ModelScope: no$'):
        read_config('modelscope://me/gone')


def test_names_that_are_none_of_modelscope(scope):
    for name in ('modelscope://', 'modelscope://me', 'modelscope://me/tiny/config.json'):
        with pytest.raises(ModelError, match=f'^{name}: expected modelscope://org/name$'):
            read_config(name)
    assert scope.asked == []


def test_without_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, 'modelscope_hub', None)
    with pytest.raises(ConfigError, match=r"modelscope://me/tiny needs .*; pip install 'vlmtune\[modelscope\]'$"):
        read_config('modelscope://me/tiny')


def test_a_reachable_hub_without_the_model(hub, monkeypatch):
    with pytest.raises(ModelError, match=r'cannot load me/gone \(no folder here, so taken for a hub id\)'):
        load_pretrained(SimpleNamespace(__name__='AutoConfig', from_pretrained=_refuse), 'me/gone')
    monkeypatch.setattr('vlmtune.utils.pretrained.hf_hub_download', _refuse)
    with pytest.raises(ModelError, match=r'cannot load me/gone \(no folder .* hub id\): no such repository$'):
        read_config('me/gone')


def _refuse(*args, **kwargs):
    raise OSError('no such repository')
