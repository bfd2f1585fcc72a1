"""An export is served by others: the command for each engine, and a real server that a client talks to."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from vlmtune.apps import serve as app
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.serve import RequestLimits, request_limits, serve
from vlmtune.cli import main
from vlmtune.utils.errors import CheckpointError, ConfigError

RECIPE = """
from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, openai_map_fn
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = {base!r}
processor = dict(type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    type=SupervisedFinetune, pretrained_model_name_or_path=pretrained_model_name_or_path, tune=dict(llm='lora')
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=SupervisedDataset,
        rows=dict(type=load_rows, path={data!r}),
        dataset_map_fn=dict(type=openai_map_fn),
        template_map_fn=dict(type=chat_template_map_fn),
        image_folder={images!r},
        max_length=4096,
    ),
)
train_cfg = dict(max_steps=1)
randomness = dict(seed=0)
plan_cache_dir = None
"""


@pytest.fixture(scope='module')
def merged(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')
    run = trained_run('llava', llm='lora')
    pth_to_hf(run.config, run.checkpoint, str(folder / 'adapter'))
    merge(run.base, str(folder / 'adapter'), str(folder / 'merged'), device='cpu')
    return folder / 'merged'


@pytest.fixture
def nothing_starts(monkeypatch):
    started = []
    monkeypatch.setattr(app.os, 'execvp', lambda file, command: started.append(command))
    return started


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


# ---- commands


def test_the_command_of_transformers(merged, capsys):
    assert main(['serve', str(merged), '--port', '8123', '--print', '--engine-options', '--dtype', 'bfloat16']) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == [sys.executable, '-P', '-m', 'transformers.cli.transformers', 'serve']
    assert words[5:] == [str(merged), '--host', '127.0.0.1', '--port', '8123', '--dtype', 'bfloat16']


def test_the_limits_of_vllm_are_those_of_the_run(tiny_model, tiny_data, tmp_path, capsys):
    base, data = tiny_model('qwen2_5_vl'), tiny_data('openai')
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(RECIPE.format(base=str(base), data=str(data.data_path), images=str(data.image_folder)))
    room = request_limits(str(recipe), new_tokens=1)
    assert room.images == 2  # of the row with two pictures
    assert room.tokens % 64 == 0
    assert request_limits(str(recipe), new_tokens=512).tokens - room.tokens in (448, 512, 576)
    command = ['serve', str(base), '--engine', 'vllm', '--config', str(recipe), '--max-new-tokens', '1', '--print']
    assert main(command) == 0
    line = capsys.readouterr().out
    folder = shlex.quote(str(base))
    assert line.startswith(f'vllm serve {folder} --host 127.0.0.1 --port 8000 --max-model-len {room.tokens} ')
    assert """--limit-mm-per-prompt '{"image": 2}'""" in line
    assert """--mm-processor-kwargs '{"min_pixels": 3136, "max_pixels": 12544}'""" in line


def test_the_length_stays_within_what_the_model_can(merged, monkeypatch, capsys):
    monkeypatch.setattr(app, 'request_limits', lambda config, new_tokens: RequestLimits(tokens=10_000_000, images=0))
    assert serve(str(merged), engine='vllm', config='x.py', show=True) == 0
    assert '--max-model-len 2048 --limit-mm-per-prompt \'{"image": 1}\'' in capsys.readouterr().out


def test_code_of_a_model_is_run_only_when_it_is_asked_for(tiny_model, capsys):
    original = str(tiny_model('internlm2'))
    with pytest.raises(CheckpointError, match='not in the layout of transformers'):
        serve(original, show=True)
    with pytest.raises(CheckpointError, match=r'only by running the \*.py files in it; read them, and if you trust'):
        serve(original, engine='vllm', show=True)
    assert serve(original, engine='vllm', show=True, options=['--trust-remote-code']) == 0
    assert capsys.readouterr().out.endswith('--trust-remote-code\n')


# ---- what cannot be served


def test_a_port_in_use_is_one_line(merged, nothing_starts, capsys):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(['serve', str(merged), '--port', port, '--no-check']) == 1
    assert capsys.readouterr().err == (
        f'error: 127.0.0.1:{port} is in use; end what listens there, or choose another with --port\n'
    )
    assert nothing_starts == []
    with pytest.raises(ConfigError, match='expected 1 to 65535'):
        serve(str(merged), port=70000)
    with pytest.raises(ConfigError, match=r'no\.such\.host\.example:8000 cannot be listened on \(.*choose others'):
        serve(str(merged), host='no.such.host.example', check=False)


def test_a_broken_export_is_not_served(merged, tmp_path, nothing_starts, capsys):
    shutil.copytree(merged, tmp_path / 'broken')
    (tmp_path / 'broken' / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=0)))
    assert serve(str(tmp_path / 'broken'), port=free_port()) == 1
    assert 'is not what it should be' in capsys.readouterr().out
    assert nothing_starts == []
    serve(str(tmp_path / 'broken'), port=free_port(), check=False)
    assert nothing_starts[0][4:6] == ['serve', str(tmp_path / 'broken')]


def test_an_adapter_has_to_be_merged(merged, tmp_path):
    with pytest.raises(CheckpointError, match=r'is an adapter, .* merge it: vlmtune convert merge /.* /.*adapter OUT'):
        serve(str(merged.parent / 'adapter'))
    with pytest.raises(CheckpointError, match='is no folder'):
        serve(str(tmp_path / 'none'))
    shutil.copytree(merged, tmp_path / 'a@b')
    with pytest.raises(CheckpointError, match='rename the folder'):
        serve(str(tmp_path / 'a@b'))


def test_a_missing_package_is_told_with_its_command(merged, tiny_model, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(ConfigError, match='--engine vllm needs vLLM, which is not installed here; .*pip install vllm'):
        serve(str(merged), engine='vllm')
    monkeypatch.setattr(app, 'joint_processor', lambda folder: None)
    with pytest.raises(ConfigError, match=r'needs torchvision for the processor of this family; .*pip install torchv'):
        serve(str(merged))
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    with pytest.raises(ConfigError, match=r"vlmtune serve needs .*uvicorn.*; pip install 'vlmtune\[serve\]'$"):
        serve(str(merged))


def test_quantised_weights_are_served_by_those_who_can_read_them(merged, tmp_path, nothing_starts, monkeypatch):
    shutil.copytree(merged, tmp_path / 'awq')
    config = json.loads((merged / 'config.json').read_text())
    config['quantization_config'] = dict(quant_method='awq', bits=4, group_size=32, zero_point=True)
    (tmp_path / 'awq' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ConfigError, match='holds awq weights, which need the package gptqmodel; pip install gptqmodel'):
        serve(str(tmp_path / 'awq'), port=free_port())
    monkeypatch.setattr(app.shutil, 'which', lambda name: f'/usr/bin/{name}')
    serve(str(tmp_path / 'awq'), engine='vllm', port=free_port())
    assert nothing_starts[0][:3] == ['vllm', 'serve', str(tmp_path / 'awq')]


def test_other_machines_are_warned_about(merged, nothing_starts, caplog):
    serve(str(merged), host='0.0.0.0', port=free_port(), check=False)
    assert 'whoever reaches 0.0.0.0 can make the server read pictures' in caplog.text


# ---- a real server


@pytest.fixture(scope='module')
def server(merged):
    port = free_port()
    command = [
        sys.executable,
        '-m',
        'vlmtune',
        'serve',
        str(merged),
        '--port',
        str(port),
        '--engine-options',
        '--device',
        'cpu',
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(port, process)
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def wait_for(port, process):
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(process.stdout.read())
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0:
                return
        time.sleep(0.2)
    process.kill()
    pytest.fail(process.communicate()[0])


@pytest.mark.slow
def test_the_openai_client_sends_a_picture(server, merged):
    """The answer is that of ``vlmtune chat``, token by token; without the picture it is another one."""
    from openai import OpenAI

    from vlmtune.apps.chat.answering import load_answerer
    from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart

    file = BytesIO()
    Image.new('RGB', (60, 40), 'red').save(file, 'PNG')
    url = 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
    content = [dict(type='image_url', image_url=dict(url=url)), dict(type='text', text='What colour is it?')]
    client = OpenAI(base_url=server, api_key='none', timeout=120)
    asked = dict(model=str(merged), messages=[dict(role='user', content=content)], max_tokens=16)
    found = client.chat.completions.create(**asked)
    message = Message('user', (ImagePart(0), TextPart('What colour is it?')))
    answerer = load_answerer(str(merged), settings=dict(max_new_tokens=16))
    want = answerer.answer(Conversation((message,), (ImageRef(data=file.getvalue()),)), lambda piece: None)
    assert found.choices[0].message.content.strip() == want
    assert want
    streamed = client.chat.completions.create(**asked, stream=True)
    whole = want.rstrip('\ufffd')  # a stream holds back the beginning of a character
    assert ''.join(c.choices[0].delta.content or '' for c in streamed if c.choices).strip() == whole.strip()
    asked['messages'] = [dict(role='user', content='What colour is it?')]
    assert client.chat.completions.create(**asked).choices[0].message.content.strip() != want
    page = Path(__file__).parents[2] / 'docs' / 'serve.md'
    (documented,) = re.findall(r'```python run\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL)
    names = dict(encoded=url.partition(',')[2], path=str(merged))
    exec(compile(documented.replace('http://127.0.0.1:8000/v1', server), 'docs/serve.md', 'exec'), names)
    assert names['answer'].choices[0].message.content
