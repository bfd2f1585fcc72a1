"""Checkpoints of strangers in original layouts: one line for each lie, nothing is run, built or waited for."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlmtune.apps.export.original import write_original
from vlmtune.data import Processor
from vlmtune.layouts import find_layout, native_view, open_weights
from vlmtune.models.lazy_model import LazyModel
from vlmtune.models.loading import load_model
from vlmtune.testing import list_tiny_originals
from vlmtune.utils.errors import CheckpointError, ModelError

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SECTION = {'points': 'llm_config', 'internvl_chat': 'llm_config'}  # where the settings of the language model stand
BOMBS = {'nested': '[' * 200_000, 'a list': '[1]', 'digits': '{"a": ' + '9' * 10_000 + '}', 'cut': '{"a'}


@pytest.fixture
def original(tiny_model, tmp_path):
    return lambda name: shutil.copytree(tiny_model(name), tmp_path / name)


def edit(path, key=None, **changes):
    content = json.loads(path.read_text())
    (content if key is None else content[key]).update(changes)
    path.write_text(json.dumps(content))


# ---- config.json


def test_parts_that_a_stranger_names_are_not_read(tiny_model, refused, tmp_path):
    parts = dict(llm_name_or_path='/etc', visual_encoder_name_or_path='/etc')
    llava = json.loads((tiny_model('llava') / 'config.json').read_text())
    content = dict(model_type='llava_parts', parts=parts | dict(pretrained_pth='/dev/zero'), llava=llava)
    (tmp_path / 'config.json').write_text(json.dumps(content))
    for read in (load_model, Processor):
        with refused('config.json.*llava_parts.*for itself', ModelError):
            read(str(tmp_path))


@pytest.mark.parametrize('name', list_tiny_originals())
@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('num_hidden_layers', 10**9),
        ('hidden_size', -1),
        ('hidden_size', 'x'),
        ('hidden_size', 10**30),
        ('num_attention_heads', 0),
        ('intermediate_size', [[1]]),
        ('rms_norm_eps', 'a\nb'),
    ],
)
def test_a_size_that_is_none(name, key, value, original, refused):
    folder = original(name)
    edit(folder / 'config.json', SECTION.get(name), **{key: value})
    with refused(f'config.json.*{key}', ModelError):
        load_model(str(folder))


@pytest.mark.parametrize(
    ('name', 'key', 'value'),
    [
        ('points', 'torch_dtype', 'x'),
        ('points', 'torch_dtype', 5),
        ('minicpmv2', 'scale_resolution', 10**9),
        ('minicpmv2', 'scale_resolution', 0),
        ('internvl_chat', 'max_dynamic_patch', 10**9),
        ('internlm2', 'model_type', ['internlm2']),
        ('internlm2', 'model_type', 'a\nb\x1b[31m'),
    ],
)
def test_a_setting_that_is_none(name, key, value, original, refused):
    folder = original(name)
    edit(folder / 'config.json', **{key: value})
    with refused(f'config.json.*{key.replace("model_type", "model type")}', ModelError):
        Processor(str(folder))


# ---- weights


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"weight_map":' + '[' * 100_000, 'is not valid json'),
        (json.dumps({'weight_map': {'a': '../../../etc/passwd'}}), r'lacks \.\./\.\./'),
        (json.dumps({'weight_map': {'a': 'b' * 5000}}), 'lacks bbbb'),
        (json.dumps({'weight_map': {'a': 'b\nc\x1b[2J'}}), r'lacks b\\nc\\x1b\[2J'),
        (json.dumps({'weight_map': [1]}), 'expected a json object with a weight_map'),
    ],
)
def test_an_index_that_lies(content, message, original, refused):
    folder = original('points')
    (folder / INDEX).write_text(content)
    with refused(message, ModelError):
        load_model(str(folder))


@pytest.mark.parametrize('name', ['a\nb\x1b[31m', '../../x', 'c' * 100_000, 'llm.model.{0.__class__}'])
def test_a_weight_with_such_a_name(name, original, refused):
    folder = original('points')
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, name: next(iter(tensors.values())).clone()}, folder / WEIGHTS, {'format': 'pt'})
    with refused('1 weights are unknown', ModelError):
        load_model(str(folder))


def test_weights_that_never_come(original, refused):
    folder = original('points')
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with refused('model.safetensors is no file', ModelError):
        open_weights(folder)


# ---- other files


@pytest.mark.parametrize('content', BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize('file', ['tokenizer_config.json', 'preprocessor_config.json', 'special_tokens_map.json'])
@pytest.mark.parametrize('name', ['points', 'minicpmv2'])
def test_a_json_file_that_is_none(name, file, content, original, harmless):
    folder = original(name)
    (folder / file).write_text(content)
    said = ''
    with harmless():
        try:
            Processor(str(folder))
        except ModelError as error:
            said = str(error)
            raise
    assert not said or str(folder) in said  # not every layout reads every file
    assert 'vlmtune-view-' not in said  # a folder that is gone


@pytest.mark.parametrize(
    'settings',
    [
        dict(added_tokens_decoder=[1]),
        dict(added_tokens_decoder={'x': {'content': 'a'}}),
        dict(added_tokens_decoder={'500': {}}),
        dict(additional_special_tokens=5),
        dict(chat_template=[1]),
        dict(padding_side='up'),
    ],
    ids=str,
)
def test_a_tokenizer_config_that_is_none(settings, original, refused):
    folder = original('internlm2')
    edit(folder / 'tokenizer_config.json', **settings)
    with refused(f'^{folder}.*tokenizer', ModelError):
        Processor(str(folder))


def test_a_tokenizer_that_cannot_end_an_answer(original, refused):
    folder = original('points')
    (folder / 'tokenizer_config.json').write_text('{}')
    with refused('tokenizer_config.json has neither pad_token nor eos_token', ModelError):
        Processor(str(folder))


# ---- tokenizer.model


def number(value):
    out = b''
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(place, payload):
    return number(place << 3 | 2) + number(len(payload)) + payload


def piece(text, score):
    return field(1, field(1, text) + b'\x15' + struct.pack('<f', score))


TOKENIZERS = {
    'an endless number': lambda own: b'\xff' * 4_000_000,
    'a size behind the end': lambda own: b'\x0a' + number(1 << 70),
    'a long piece': lambda own: own + piece(b'a' * 60_000, -1.0),
    'a chain of pieces': lambda own: own + b''.join(piece(b'a' * i, -float(i)) for i in range(2, 3000)),
    'pieces without number': lambda own: own + b'\x08\x00' * 4_000_000,
    'more bytes than any': lambda own: own + bytes(1 << 25),
    'a table of characters': lambda own: own + field(3, field(2, b'\xff' * 1000)),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_tokenizer_model_that_lies(name, original, refused):
    folder = original('internlm2')
    path = folder / 'tokenizer.model'
    path.write_bytes(TOKENIZERS[name](path.read_bytes()))
    with refused('tokenizer.model.*copy it again', ModelError), native_view(str(folder)):
        pass


# ---- what is copied


LINKS = {'points': 'vocab.json', 'internvl_chat': 'merges.txt', 'minicpmv2': 'chat_template.jinja'}


@pytest.mark.parametrize('name', LINKS)
def test_a_link_to_a_file_of_the_user(name, original, refused, tmp_path):
    folder = original(name)
    (tmp_path / 'key').write_text('<image> private')
    if name == 'internvl_chat':
        (folder / 'tokenizer.model').unlink()  # beside which no other file of a tokenizer is read
    (folder / LINKS[name]).unlink(missing_ok=True)
    (folder / LINKS[name]).symlink_to(tmp_path / 'key')
    message = f'{LINKS[name]} is a link that leads out of {folder}; put the file itself there'
    with refused(message, ModelError), native_view(str(folder)):
        pass


@pytest.mark.parametrize('name', LINKS)
def test_links_of_the_hub_cache_are_followed(name, tiny_model, tmp_path):
    files = shutil.copytree(tiny_model(name), tmp_path / 'blobs')
    template = f'{{{{ messages }}}}{find_layout(str(files)).image_token or ""}'
    (files / 'chat_template.jinja').write_text(template)
    folder = tmp_path / 'snapshots' / 'abc'
    folder.mkdir(parents=True)
    for path in files.iterdir():
        (folder / path.name).symlink_to(path)
    (tmp_path / 'model').symlink_to(folder)
    for named in (folder, tmp_path / 'model'):
        with native_view(str(named)) as view:
            assert not any(path.is_symlink() for path in Path(view).iterdir())
            assert (Path(view) / 'chat_template.jinja').read_text() == template


@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to(path.name)], ids=['a pipe', 'a loop'])
def test_what_is_no_file_is_not_copied(make, original, refused, tmp_path):
    folder = original('internlm2')
    make(folder / 'notes.txt')
    model, _ = load_model(str(folder))
    (tmp_path / 'out').mkdir()
    with refused('notes.txt is no file', CheckpointError):
        write_original(LazyModel.of(model), tmp_path / 'out', base=str(folder), layout=find_layout(str(folder)))
