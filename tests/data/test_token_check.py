"""A tokenizer that lacks a token of the family reads it as letters; that is told when the processor is built."""

import json
import shutil

import pytest

from vlmtune.data import Processor
from vlmtune.testing import list_tiny_models, list_tiny_originals
from vlmtune.utils.errors import ModelError


def without_token(folder, token):
    """Take an added token out of a fast tokenizer, as when files of two versions were mixed."""
    path = folder / 'tokenizer.json'
    content = json.loads(path.read_text())
    content['added_tokens'] = [entry for entry in content['added_tokens'] if entry['content'] != token]
    content['model']['vocab'] = {f'_{k}' if k == token else k: v for k, v in content['model']['vocab'].items()}
    path.write_text(json.dumps(content))
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    kept = {k: v for k, v in config.items() if token not in json.dumps(v)}
    (folder / 'tokenizer_config.json').write_text(json.dumps(kept))


@pytest.mark.parametrize('name', [*list_tiny_models(), *list_tiny_originals()])
def test_a_complete_tokenizer(name, tiny_model):
    Processor(str(tiny_model(name)))


@pytest.mark.parametrize(
    ('name', 'token'),
    [
        ('qwen2_5_vl', '<|vision_start|>'),
        ('qwen2', '<|im_start|>'),
        ('smolvlm', '<row_1_col_1>'),
        ('points', '<|im_start|>'),
    ],
)
def test_a_token_that_is_missing(name, token, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(name), tmp_path / name)
    without_token(folder, token)
    with pytest.raises(ModelError, match=rf'lacks 1 special tokens of {name} \(first: {token}\)'.replace('|', r'\|')):
        Processor(str(folder))


def test_a_token_around_slices_that_is_missing(tiny_model, tmp_path):
    """Only large images have slices."""
    folder = shutil.copytree(tiny_model('minicpmv2'), tmp_path / 'minicpmv2')
    path = folder / 'tokenizer.model'
    path.write_bytes(path.read_bytes().replace(b'</slice>', b'</slicf>'))
    for other in folder.glob('*token*.json'):
        other.write_text(other.read_text().replace('</slice>', '</slicf>'))
    with pytest.raises(ModelError, match=r'lacks 1 special tokens of minicpmv2 \(first: </slice>\)'):
        Processor(str(folder))


def test_a_name_of_a_token_that_is_missing(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model('internvl'), tmp_path / 'internvl')
    without_token(folder, '<img>')
    with pytest.raises(ModelError, match=r'tokenizer_config.json or .* lacks a key .*start_image_token'):
        Processor(str(folder))


def test_a_template_that_a_config_names_may_be_plain_text_to_a_model(tiny_model):
    processor = Processor(str(tiny_model('llama')), prompt_template='chatml')
    assert len(processor.encoder.template_ids('<|im_start|>')) > 1


@pytest.mark.parametrize(('key', 'value'), [('image_token_id', 7), ('image_token_index', 99999)])
def test_an_image_token_that_is_another_one(key, value, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model('llava'), tmp_path / 'llava')
    config = {k: v for k, v in json.loads((folder / 'config.json').read_text()).items() if 'image_token' not in k}
    (folder / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=rf'config.json says that token {value} stands for images \(image_token_id\)'):
        Processor(str(folder))
