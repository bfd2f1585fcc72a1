"""Access keys never reach what a run writes, prints or says when it fails."""

import logging

import pytest

from vlmtune.cli import main
from vlmtune.config import load_config, redact_secrets
from vlmtune.utils.errors import DataError
from vlmtune.utils.secrets import PLACEHOLDER, without_secrets

TOKENS = dict(
    hub='hf_PLANTEDplantedPLANTEDplanted01',
    tracker='0123456789abcdefPLANTED0123456789abcdef0',
    plain='plantedPASSWORDofNoKnownLook',
    login='https://me:plantedLOGIN@example.org/x',
    token_login='https://plantedTOKENlogin@example.org/x',
    query='https://example.org/a.png?width=3&access_token=plantedQUERY&x=1',
    variable='plantedVARIABLEofTheHub',
)
MARKS = ('PLANTED', 'planted')
MORE = """
from talkative_tracker import Tracker

hf_token = {hub!r}
password = {plain!r}
experiment_name = 'a run with {query}'
custom_hooks = [dict(type=Tracker, token=hf_token, note={token_login!r}, link={login!r},
                     auth=dict(api_key={tracker!r}), told='with ' + password + ' inside')]
"""
TRACKER = """
import logging

from mmengine.hooks import Hook


class Tracker(Hook):
    def __init__(self, *, token, note, link, auth, told):
        self.known = [token, note, link, auth['api_key'], told]

    def before_train(self, runner):
        for known in self.known:
            logging.getLogger('tracker').warning('signing in with %s', known)
            runner.logger.info(f'signed in with {known}')
            runner.message_hub.update_info('tracker', known)
"""


@pytest.fixture(autouse=True)
def tracker(tmp_path_factory, monkeypatch):
    """A hook of the operator's own that says what it knows."""
    folder = tmp_path_factory.getbasetemp() / 'own_modules'
    folder.mkdir(exist_ok=True)
    (folder / 'talkative_tracker.py').write_text(TRACKER)
    monkeypatch.syspath_prepend(folder)


def planted(data):
    return [mark for mark in MARKS if mark.encode() in data]


def written(folder):
    """Every file below a folder that holds a planted text."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    assert files
    found = {str(path): planted(path.read_bytes()) for path in files}
    return {path: marks for path, marks in found.items() if marks}


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """A run that knows all those secrets; its work dir."""
    monkeypatch.setenv('HF_TOKEN', TOKENS['variable'])

    def go():
        path = recipe(more=MORE.format(**TOKENS))
        code = main(['train', path, '--work-dir', str(tmp_path / 'work')])
        return code, tmp_path / 'work'

    return go


def test_nothing_that_a_run_writes_or_prints_holds_one(run, capfd):
    code, work_dir = run()
    out, err = capfd.readouterr()
    assert code == 0, err
    assert 'signed in with' in out + err
    assert PLACEHOLDER in (work_dir / 'iter_1.pth' / 'config.py').read_text()
    assert written(work_dir) == {}
    assert planted((out + err).encode()) == []


def test_nothing_that_a_failing_run_says_holds_one(recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKENS['variable'])
    for given in (TOKENS['login'], TOKENS['query'], TOKENS['variable'], f'org/{TOKENS["hub"]}'):
        code = main(['train', recipe(), '--work-dir', str(tmp_path / 'w'), '--cfg-options', f'load_from={given}'])
        assert code == 1
        assert planted(''.join(capfd.readouterr()).encode()) == []


def test_libraries_log_none(recipe, caplog):
    load_config(recipe(more=MORE.format(**TOKENS)))
    logging.getLogger('some.library').warning('GET %s with %s', TOKENS['login'], TOKENS['plain'])
    logging.getLogger('some.library').warning('100 % sure: %s')
    assert planted(caplog.text.encode()) == []
    assert f'GET https://{PLACEHOLDER}@example.org/x with {PLACEHOLDER}' in caplog.text


@pytest.mark.parametrize('name', TOKENS)
def test_every_error_is_clean(name, recipe, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKENS['variable'])
    cfg = load_config(recipe(more=MORE.format(**TOKENS)))
    assert planted(str(redact_secrets(cfg).to_dict()).encode()) == []
    assert planted(str(DataError(f'image at {TOKENS[name]} is broken')).encode()) == []


@pytest.mark.parametrize(
    'text',
    [
        'sample 3 (train.jsonl:3) has 3 <image> marks but 2 images',
        'no model at /home/me/models/qwen; expected a folder',
        'https://example.org/a.png?width=3&key_frames=2',
        'pad_token, eos_token and hf_hub are words; sk-learn and a mail to me@example.org are, too',
        'the bearer of this message',
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert without_secrets(text) == text
