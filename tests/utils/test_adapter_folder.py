"""What is looked at in the folder of an adapter, before anything is loaded."""

import json
import math

import pytest

from vlmtune.utils.adapter_folder import adapter_settings, adapter_weights, base_of, is_adapter, split_adapter
from vlmtune.utils.errors import CheckpointError

PLAIN = dict(peft_type='LORA', r=4, lora_alpha=2.5, rank_pattern={'q_proj': 2}, alpha_pattern=None)


def write(folder, **settings):
    (folder / 'adapter_config.json').write_text(json.dumps(PLAIN | settings))


def test_a_folder_is_an_adapter_where_its_settings_lie(tmp_path):
    assert not is_adapter(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    assert split_adapter(str(tmp_path)) == (str(tmp_path), None)
    write(tmp_path, base_model_name_or_path='org/base')
    assert is_adapter(tmp_path)  # also beside a config.json, as the code of the first LLaVA writes them
    assert split_adapter(str(tmp_path)) == ('org/base', str(tmp_path))
    assert split_adapter(str(tmp_path), 'other') == (str(tmp_path), 'other')


def test_rank_and_alpha_are_those_of_peft_where_none_are_named(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    assert adapter_settings(tmp_path) == dict(peft_type='LORA', target_modules=['q_proj'], r=8, lora_alpha=8)
    write(tmp_path)
    assert adapter_settings(tmp_path) == PLAIN


@pytest.mark.parametrize('base', [None, ''])
def test_an_adapter_that_names_no_base(base, tmp_path):
    write(tmp_path, base_model_name_or_path=base)
    assert base_of(tmp_path) is None
    with pytest.raises(CheckpointError, match=f'names no base model; give the base, and --adapter {tmp_path}$'):
        split_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(peft_type='LOHA'), "peft_type='LOHA', expected an adapter of type LORA"),
        (dict(peft_type='a\nb' * 99), r"peft_type='a\\nb.{,80}, expected"),
        (dict(r=0), 'r=0, expected a number from 1 on'),
        (dict(r=2.5), 'r=2.5, expected'),
        (dict(r='__import__("os")'), 'r=.*, expected'),
        (dict(lora_alpha=None), 'lora_alpha=None, expected a number from 0 on'),
        (dict(lora_alpha=math.inf), 'lora_alpha=inf, expected'),
        (dict(lora_alpha=math.nan), 'lora_alpha=nan, expected'),
        (dict(rank_pattern=[1]), r'rank_pattern=\[1\], expected numbers by the names of layers'),
        (dict(alpha_pattern={'q_proj': 'x'}), "alpha_pattern={'q_proj': 'x'}, expected"),
        (dict(base_model_name_or_path=['a']), r"base_model_name_or_path=\['a'\], expected a folder or a hub id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_settings_that_are_none(settings, message, tmp_path):
    write(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=f'adapter_config.json: {message}') as caught:
        adapter_settings(tmp_path)
    assert '\n' not in str(caught.value)


def test_a_folder_without_settings_or_weights(tmp_path):
    with pytest.raises(CheckpointError, match=f'no adapter at {tmp_path}; expected a folder with adapter_config.json'):
        adapter_settings(tmp_path)
    (tmp_path / 'adapter_model.bin').touch()
    with pytest.raises(CheckpointError, match='has no adapter_model.safetensors; adapters in other formats are not'):
        adapter_weights(tmp_path)
    (tmp_path / 'adapter_model.safetensors').touch()
    assert adapter_weights(tmp_path) == tmp_path / 'adapter_model.safetensors'
