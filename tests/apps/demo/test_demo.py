"""The folder of examples for the demo, its server, and the command."""

import re
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.apps.demo.parrots import Parrot
from vlmtune.apps.demo import build_demo, make_server, read_example_folder
from vlmtune.cli import main
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.ports import listen

ROOT = Path(__file__).resolve().parents[3]


# ---- a folder of examples


def test_the_folder_gives_pictures_with_their_questions_and_prompts(tmp_path):
    for name in ('b.png', 'a.JPG'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    (tmp_path / 'b.txt').write_text('What is it?\n')
    (tmp_path / 'prompts.txt').write_text('Describe.\n\n  Read it. \n')
    (tmp_path / 'notes.md').write_text('not an example')
    found = read_example_folder(tmp_path)
    assert [(picture.path.name, picture.question) for picture in found.pictures] == [
        ('a.JPG', ''),
        ('b.png', 'What is it?'),
    ]
    assert found.prompts == ('Describe.', 'Read it.')


def test_a_folder_that_is_no_folder_of_examples(tmp_path):
    with pytest.raises(ConfigError, match=r'--examples .*nowhere: no folder at'):
        read_example_folder(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match=r'expected images \(.*\) or prompts.txt, found neither'):
        read_example_folder(tmp_path)
    (tmp_path / 'prompts.txt').write_text('why?\n' * 13)
    with pytest.raises(ConfigError, match='has 13 lines in prompts.txt; expected at most 12'):
        read_example_folder(tmp_path)
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'prompts.txt').unlink()
    with pytest.raises(DataError, match=r'not an image file: .*text\.png'):
        read_example_folder(tmp_path)


# ---- the server


def test_the_server_gives_away_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'True')  # the page has its own mind
    secret = tmp_path / 'secret.png'
    Image.new('RGB', (8, 8)).save(secret)
    blocks = build_demo([Parrot()])
    box = next(i for i, block in blocks.blocks.items() if block.elem_id == 'message')
    send = next(i for i, event in blocks.fns.items() if (box, 'submit') in event.targets)
    with TestClient(make_server(blocks).config.app) as client:
        assert client.get('/').status_code == 200
        assert client.get(f'/gradio_api/file={secret}').status_code == 403
        assert client.get('/gradio_api/file=setup.py').status_code in (403, 404)
        given = dict(text='what?', files=[dict(path=str(secret), meta=dict(_type='gradio.FileData'))])
        body = dict(data=[given, None], fn_index=send, session_hash='a', trigger_id=box)
        answer = client.post('/gradio_api/run/predict', json=body)
        assert answer.status_code == 500
        assert not list(tmp_path.glob('uploads/**/secret.png'))
    assert blocks.analytics_enabled is False


def test_a_port_in_use_is_one_line_before_a_model_is_loaded(capsys):
    with listen('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        assert main(['demo', 'no/such', '--port', str(port)]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == (
        f'error: 127.0.0.1:{port} is in use; end what listens there, or choose another with --port'
    )


def test_addresses_that_are_none():
    with pytest.raises(ConfigError, match=r'no\.such\.invalid:0 cannot be listened on \('):
        listen('no.such.invalid', 0)
    with pytest.raises(ConfigError, match='is no address of this machine'):
        listen('192.0.2.1', 0)


def test_the_command_passes_everything_on(monkeypatch):
    calls = []
    monkeypatch.setattr('vlmtune.apps.demo.demo', lambda **named: calls.append(named))
    line = 'demo m --adapter a --compare b --examples e --system s --max-new-tokens 9 --bits 4 --host 0.0.0.0 --port 0'
    assert main(line.split()) == 0
    named = dict(adapter='a', compare='b', examples='e', system='s', max_new_tokens=9, bits=4, host='0.0.0.0', port=0)
    assert calls == [dict(model='m', **named)]


def test_ports_are_checked_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(['demo', 'model', '--port', '70000'])
    assert "expected a port, 0 to 65535, got '70000'" in capsys.readouterr().err


def test_without_gradio_the_command_that_installs_it_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith('vlmtune.apps.demo')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert main(['demo', 'model']) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("the web demo needs the package gradio, which is not installed; pip install 'vlmtune[demo]'")
    )


def test_the_program_of_the_guide_runs(monkeypatch):
    program = re.search(r'```python run\n(.*?)```', (ROOT / 'docs' / 'demo.md').read_text('utf-8'), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    made: dict = {}
    exec(compile(program, 'docs/demo.md', 'exec'), made)
    assert [block.label for block in made['page'].blocks.values() if block.elem_id == 'chat-0'] == ['quickstart/base']
