"""LLaVAs from parts that cannot be: one line for each."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.data import Processor
from vlmtune.data.placeholders import fixed_grid
from vlmtune.layouts import check_same_parts, find_source
from vlmtune.models import SupervisedFinetune
from vlmtune.models.loading import load_model
from vlmtune.structures import ImageSize
from vlmtune.testing.tiny_processors import PREPROCESSORS
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError, ModelError

NOTE = json.loads((Path(__file__).resolve().parents[1] / 'goldens' / 'llava_parts.json').read_text(encoding='utf-8'))
PATCHES = 9  # of an image


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


def settings_of(parts: Path, pretrained_pth: str | Path | None = 'iter_1.pth', **others: Any) -> dict[str, Any]:
    settings = dict(llm_name_or_path=str(parts / 'llm'), visual_encoder_name_or_path=str(parts / 'tower'))
    pth = None if pretrained_pth is None else str(parts / pretrained_pth)
    return settings | dict(pretrained_pth=pth) | others


@pytest.mark.parametrize(
    ('changed', 'error', 'message'),
    [
        (dict(llm_name='x'), ConfigError, "no 'llm_name', did you mean 'llm_name_or_path'"),
        (dict(llm_name_or_path=None), ConfigError, 'llm_name_or_path=None: expected a folder or a hub id'),
        (dict(vision_feature_layer=9), ConfigError, 'vision_feature_layer=9, but .* has 3 layers'),
        (dict(vision_feature_layer=[-2]), ConfigError, 'expected the number of a layer'),
        (dict(pad_image_to_square='yes'), ConfigError, "pad_image_to_square='yes': expected True or False"),
        (dict(vision_feature_select_strategy='cls'), ConfigError, "'cls': expected default or full"),
        (dict(pretrained_pth='/nowhere/iter_1.pth'), CheckpointError, '/nowhere/iter_1.pth does not exist; expected'),
    ],
)
def test_settings_that_cannot_be_right(changed: dict[str, Any], error: type, message: str, llava_parts: Path):
    with pytest.raises(error, match=message):
        find_source(settings_of(llava_parts) | changed)


def test_parts_that_are_none(llava_parts: Path, tiny_model: Any, tmp_path: Path):
    with pytest.raises(ModelError, match='visual_encoder_name_or_path: .* is a llama; expected clip or siglip'):
        find_source(settings_of(llava_parts) | dict(visual_encoder_name_or_path=str(tiny_model('llama'))))
    with pytest.raises(ModelError, match='llm_name_or_path: .* is a qwen2_vl, which sees images already'):
        find_source(settings_of(llava_parts) | dict(llm_name_or_path=str(tiny_model('qwen2_vl'))))
    clip = write_tiny_tower('clip', tmp_path / 'clip')
    with pytest.raises(ModelError, match="llm_name_or_path: .*clip: model type 'clip' is not supported"):
        find_source(settings_of(llava_parts) | dict(llm_name_or_path=str(clip)))


def test_images_of_another_size_than_the_towers(llava_parts: Path, tmp_path: Path):
    tower = shutil.copytree(llava_parts / 'tower', tmp_path / 'tower')
    settings = PREPROCESSORS['llava'] | dict(crop_size=dict(height=56, width=56))
    write_json(tower / 'preprocessor_config.json', settings)
    with pytest.raises(ModelError, match='preprocessor_config.json of .* 56x56, but config.json has image_size=42'):
        find_source(settings_of(llava_parts) | dict(visual_encoder_name_or_path=str(tower)))


def test_a_language_model_whose_logits_are_scaled(llava_parts: Path, tmp_path: Path):
    shutil.copytree(llava_parts / 'llm', tmp_path / 'llm')
    write_json(tmp_path / 'llm' / 'config.json', dict(model_type='granite', vocab_size=320, logits_scaling=8.0))
    with pytest.raises(ModelError, match='is a granite and cannot be put into a LLaVA: .* no logits_scaling'):
        find_source(settings_of(llava_parts) | dict(llm_name_or_path=str(tmp_path / 'llm')))


@pytest.mark.parametrize('mode', ['frozen', 'lora'])
def test_a_new_projector_has_to_train(mode: str, llava_parts: Path):
    tune = dict(vision_encoder='frozen', projector=mode, llm='lora')
    with pytest.raises(ConfigError, match='without pretrained_pth the projector is new'):
        SupervisedFinetune.check(settings_of(llava_parts, None), tune=tune, device='cpu')
    SupervisedFinetune.check(settings_of(llava_parts), tune=tune, device='cpu')


def broken(llava_parts: Path, tmp_path: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    torch.save(dict(tensors), tmp_path / name)
    return settings_of(llava_parts, tmp_path / name)


def test_a_projector_that_does_not_fit(llava_parts: Path, tmp_path: Path):
    projector = torch.load(llava_parts / 'iter_1.pth')['state_dict']
    wide = projector | {'projector.model.0.weight': torch.zeros(64, 48)}
    with pytest.raises(ModelError, match=r'projector.model.0.weight is \(64, 48\).* asks for \(64, 32\)'):
        load_model(broken(llava_parts, tmp_path, 'wide.pth', wide))
    deep = projector | {'projector.model.4.weight': torch.zeros(64, 64)}
    with pytest.raises(ModelError, match=r'1 weights are unknown \(first: projector.model.4.weight\)'):
        load_model(broken(llava_parts, tmp_path, 'deep.pth', deep))
    lora = projector | {NOTE['pth_with_adapters'][0]: torch.zeros(4, 64)}
    with pytest.raises(CheckpointError, match='holds LoRA layers .* without their alpha'):
        load_model(broken(llava_parts, tmp_path, 'lora.pth', lora))
    with pytest.raises(CheckpointError, match='holds model.layers.0.weight, expected a projector'):
        load_model(broken(llava_parts, tmp_path, 'other.pth', {'model.layers.0.weight': torch.zeros(1)}))
    del projector['projector.model.2.bias']
    with pytest.raises(CheckpointError, match=r'pretrained_pth: .*/cut.pth holds no projector.model.2.bias; expected'):
        load_model(broken(llava_parts, tmp_path, 'cut.pth', projector))


def test_a_whole_llava_is_no_projector(llava_parts: Path, tiny_model: Any):
    with pytest.raises(CheckpointError, match='is a llava, no projector; .* as pretrained_model_name_or_path'):
        load_model(settings_of(llava_parts, tiny_model('llava')))


def test_model_and_processor_are_of_the_same_parts(llava_parts: Path):
    model, plain = settings_of(llava_parts), settings_of(llava_parts, None, vision_feature_layer=-2)
    check_same_parts(model, plain)
    check_same_parts(model, 'some/model')
    with pytest.raises(ConfigError, match='pad_image_to_square is False in model.*, but True in that of the processor'):
        check_same_parts(model, plain | dict(pad_image_to_square=True))


@pytest.mark.parametrize(
    ('file', 'changed', 'message'),
    [
        ('projector/config.json', dict(depth=3), 'has depth=3, expected 2'),
        ('projector/config.json', dict(hidden_act='relu'), "has hidden_act='relu', expected 'gelu'"),
        ('llm_adapter/adapter_config.json', dict(use_dora=True), 'use_dora=True is not read'),
        ('llm_adapter/adapter_config.json', dict(peft_type='LOHA'), 'expected an adapter of type LORA'),
        ('llm_adapter/adapter_config.json', dict(r=0), 'adapter_config.json: r=0, expected a number from 1'),
        ('llm_adapter/adapter_config.json', dict(lora_alpha=None), 'adapter_config.json: lora_alpha=None, expected'),
    ],
)
def test_folders_of_another_kind(file: str, changed: dict[str, Any], message: str, llava_parts: Path, tmp_path: Path):
    shutil.copytree(llava_parts / 'hf', tmp_path / 'hf')
    path = tmp_path / 'hf' / file
    write_json(path, json.loads(path.read_text()) | changed)
    with pytest.raises(CheckpointError, match=message):
        load_model(settings_of(llava_parts, tmp_path / 'hf'))


def test_an_adapter_of_another_model(llava_parts: Path, tmp_path: Path):
    shutil.copytree(llava_parts / 'hf', tmp_path / 'hf')
    shutil.copy(llava_parts / 'hf/visual_encoder_adapter/adapter_model.safetensors', tmp_path / 'hf/llm_adapter')
    with pytest.raises(CheckpointError, match='holds vision_model.* for which llm has no place'):
        load_model(settings_of(llava_parts, tmp_path / 'hf'))


def test_an_image_whose_square_would_be_huge(llava_parts: Path):
    with pytest.raises(DataError, match='a square of 40000x40000; crop it'):
        fixed_grid(Processor(settings_of(llava_parts, pad_image_to_square=True)), ImageSize(40000, 10), images=1)
    assert fixed_grid(Processor(settings_of(llava_parts)), ImageSize(40000, 10), images=1).patches == PATCHES
