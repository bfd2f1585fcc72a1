"""An ``internvl_chat`` that is not one, or not one that is known: one line that says what was found and expected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.data import Processor
from vlmtune.layouts import read_config
from vlmtune.models import load_model
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import DataError, ModelError

TILE = 56  # pixels


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that the test may break."""
    return Path(shutil.copytree(tiny_model('internvl_chat'), tmp_path / 'original'))


def change(folder: Path, name: str = 'config.json', **settings: Any) -> None:
    """Other settings in a json file; ``a__b`` is b in the section a."""
    content = json.loads((folder / name).read_text(encoding='utf-8'))
    for key, value in settings.items():
        section, _, name_of_it = key.rpartition('__')
        (content[section] if section else content)[name_of_it] = value
    (folder / name).write_text(json.dumps(content), encoding='utf-8')


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        (dict(ps_version='v1'), "ps_version='v1', expected 'v2'"),
        (dict(pad2square=True), 'pad2square=True'),
        (dict(use_llm_lora=16), 'use_llm_lora=16, expected 0; merge its LoRA first'),
        (dict(use_backbone_lora=16), 'use_backbone_lora=16'),
        (dict(llm_config=None), 'llm_config is NoneType'),
        (dict(llm_config__architectures=['GptOssForCausalLM']), "is 'GptOssForCausalLM'; supported are InternLM2For"),
        (dict(llm_config__architectures=None), "llm_config is ''"),
        (dict(force_image_size=112), f'force_image_size=112, but vision_config.image_size={TILE}'),
        (dict(select_layer=-4), 'select_layer=-4, but the vision encoder has 2 layers; expected a whole'),
        (dict(select_layer=None), 'select_layer=None'),
        (dict(llm_config__rope_scaling={'type': 'yarn', 'factor': 2.0}), "llm_config.rope_scaling={'type': 'yarn'"),
        (dict(vision_config__drop_path_rate=0.1), 'drop_path_rate'),
        (dict(vision_config__qk_normalization=True, vision_config__layer_norm_eps=1e-5), 'layer_norm_eps=1e-05'),
    ],
)
def test_a_config(folder: Path, settings: dict[str, Any], words: str):
    change(folder, **settings)
    with pytest.raises(ModelError) as error:
        read_config(str(folder))
    assert words in str(error.value)
    assert str(error.value).startswith(f'{folder / "config.json"}: ')
    assert '\n' not in str(error.value)


def test_a_rope_of_another_phi3(folder: Path):
    change(folder, llm_config__architectures=['Phi3ForCausalLM'], llm_config__rope_scaling={'type': 'yarn'})
    with pytest.raises(ModelError, match=r"llm_config\.rope_scaling has type 'yarn', expected su or longrope"):
        read_config(str(folder))


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        (dict(template='vicuna'), "template='vicuna', expected one of internlm2-chat"),
        (dict(template='phi3-chat'), "the tokenizer lacks <|assistant|>, which template='phi3-chat' writes"),
        (dict(use_thumbnail=False), 'use_thumbnail=False'),
        (dict(max_dynamic_patch=None), 'min_dynamic_patch=1 and max_dynamic_patch=None; expected'),
        (dict(max_dynamic_patch=0), 'max_dynamic_patch=0'),
        (dict(min_dynamic_patch=5), 'min_dynamic_patch=5 and max_dynamic_patch=4'),
    ],
)
def test_a_prompt_or_tiles(folder: Path, settings: dict[str, Any], words: str):
    change(folder, **settings)
    with pytest.raises(ModelError) as error:
        Processor(str(folder))
    assert words in str(error.value)
    assert '\n' not in str(error.value)


# ---- the tokenizer


def forget(folder: Path, token: str) -> None:
    config = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    added = {i: known for i, known in config['added_tokens_decoder'].items() if known['content'] != token}
    extra = [known for known in config['additional_special_tokens'] if known != token]
    change(folder, 'tokenizer_config.json', added_tokens_decoder=added, additional_special_tokens=extra)


def test_a_tokenizer_of_another_model(folder: Path):
    forget(folder, '<IMG_CONTEXT>')
    with pytest.raises(
        ModelError, match="has the added token '<IMG_CONTEXT>'; this tokenizer belongs to another model"
    ):
        load_model(str(folder))


def test_a_tokenizer_that_lacks_what_stands_around_images(folder: Path):
    forget(folder, '</box>')
    forget(folder, '</ref>')  # ids have no holes, so the last ones go
    for token in ('<box>', '<ref>', '</quad>', '<quad>', '<IMG_CONTEXT>', '</img>'):
        forget(folder, token)
    tokens = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))['added_tokens_decoder']
    (folder / 'added_tokens.json').write_text(json.dumps({'<IMG_CONTEXT>': max(map(int, tokens)) + 1}))
    with pytest.raises(ModelError, match='the tokenizer lacks </img>; it belongs to another model'):
        Processor(str(folder))


def test_the_image_token_is_found_in_any_of_the_files(folder: Path, tmp_path: Path):
    """In tokenizer_config.json at first."""
    expected = read_config(str(folder)).image_token_id
    Processor(str(folder)).save(tmp_path / 'made')
    change(folder, 'tokenizer_config.json', added_tokens_decoder={})
    (folder / 'added_tokens.json').write_text(json.dumps({'<img>': 7, '<IMG_CONTEXT>': expected}))
    assert read_config(str(folder)).image_token_id == expected
    (folder / 'added_tokens.json').unlink()
    with pytest.raises(ModelError, match=r'none of added_tokens\.json, tokenizer_config\.json, tokenizer\.json has'):
        read_config(str(folder))
    shutil.copyfile(tmp_path / 'made' / 'tokenizer.json', folder / 'tokenizer.json')
    assert read_config(str(folder)).image_token_id == expected


def test_no_tokenizer(folder: Path):
    (folder / 'tokenizer.model').unlink()
    with pytest.raises(
        ModelError, match=r'has no tokenizer: expected tokenizer\.model, tokenizer\.json or vocab\.json'
    ):
        Processor(str(folder))


# ---- weights and images


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('vision_model.encoder.layers.1.attn.qkv.weight', 'by the name here: model.vision_tower.encoder.layer.1'),
        ('language_model.model.layers.0.attention.wqkv.weight', 'by the name here: model.language_model.layers.0'),
        ('mlp1.3.bias', 'by the name here: model.multi_modal_projector.linear_2.bias'),
    ],
)
def test_a_weight_that_is_missing_and_one_that_is_unknown(folder: Path, name: str, words: str):
    weights = load_file(folder / 'model.safetensors')
    weights['language_model.model.extra'] = weights.pop(name)
    save_file(weights, folder / 'model.safetensors')
    with pytest.raises(ModelError) as error:
        load_model(str(folder))
    assert words in str(error.value)
    assert '1 weights are unknown (first: language_model.model.extra)' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_weight_of_another_size(folder: Path):
    change(folder, vision_config__intermediate_size=48)
    with pytest.raises(ModelError, match=r'mlp\.fc\d\.\w+ is \(\d.*, which makes .* asks for \('):
        load_model(str(folder))


def test_more_image_tokens_than_features(folder: Path):
    """And more marks than images."""
    processor = Processor(str(folder))
    messages = (Message('user', (ImagePart(0), TextPart('What?'))),)
    with pytest.raises(DataError, match='shows 1 images but the conversation has 0'):
        processor.tokenize(Conversation(messages, (ImageRef(path='0.png'),)), image_sizes=[])
    model, _ = load_model(str(folder))
    ids = torch.full((1, 5), processor.image_token_id)
    with pytest.raises(ValueError, match='tokens: 5'):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, TILE, TILE))


def test_one_tile_where_tiles_are_off(folder: Path):
    change(folder, dynamic_image_size=False, use_thumbnail=False)
    assert Processor(str(folder)).image_processor.max_patches == 1
