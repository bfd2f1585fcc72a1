"""What was trained with is what other programs load."""

import json

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from vlmtune.families import FAMILIES
from vlmtune.utils.imports import import_name

VISION = [name for name, family in FAMILIES.items() if family.has_vision]
CHANGED = {
    'qwen2_vl': {'max_pixels': 6 * 28 * 28},
    'qwen2_5_vl': {'max_pixels': 6 * 28 * 28, 'min_pixels': 5 * 28 * 28},
    'qwen3_vl': {'max_pixels': 6 * 32 * 32},
    'internvl': {'max_patches': 1},
    'idefics3': {'size': {'longest_edge': 56}},
}
PICTURE = Image.radial_gradient('L').resize((333, 201)).convert('RGB')


def pixels(image_processor, name):
    images = [[PICTURE]] if 'pixel_attention_mask' in FAMILIES[name].image_inputs else [PICTURE]
    return image_processor(images=images, return_tensors='pt')['pixel_values']


@pytest.mark.parametrize(
    ('name', 'changed'),
    [*((name, False) for name in VISION), *((name, True) for name in CHANGED)],
    ids=[*VISION, *(f'{name} changed' for name in CHANGED)],
)
def test_saved_files_reload_equal(name, changed, processor, tmp_path):
    mine = processor(name, image_processor=CHANGED[name]) if changed else processor(name)
    mine.save(tmp_path)
    own = FAMILIES[name].image_processor
    reloaded = (AutoImageProcessor if own is None else import_name(own)).from_pretrained(tmp_path)
    assert type(reloaded) is type(mine.image_processor)
    assert reloaded.to_dict() == mine.image_processor.to_dict()
    expected = mine.image_inputs([PICTURE])['pixel_values']
    assert (pixels(reloaded, name) - expected).abs().max() < 1e-5  # one multiply-add here, two steps in the library
    if changed:
        assert expected.shape != processor(name).image_inputs([PICTURE])['pixel_values'].shape


@pytest.mark.parametrize('name', [name for name in VISION if FAMILIES[name].model is None])
def test_names_are_those_of_the_hub(name, processor, tiny_model, tmp_path):
    """Other programs know the family by them; Pil and Fast are this transformers' own suffixes."""
    processor(name).save(tmp_path)
    mine, source = (json.loads((p / 'preprocessor_config.json').read_text()) for p in (tmp_path, tiny_model(name)))
    assert mine['image_processor_type'] == source['image_processor_type'].removesuffix('Fast')
    assert mine['processor_class'] == source['processor_class']
    joint = tiny_model(name) / 'processor_config.json'
    assert (tmp_path / 'processor_config.json').exists() == joint.exists()
    if joint.exists():
        assert json.loads((tmp_path / 'processor_config.json').read_text()) == json.loads(joint.read_text())


def test_an_image_processor_inside_processor_config_is_replaced_there_too(tiny_model, tmp_path):
    from vlmtune.data import Processor

    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    for file in tiny_model('qwen2_vl').iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    stored = json.loads((source / 'preprocessor_config.json').read_text())
    joint = {'processor_class': 'Qwen2VLProcessor', 'image_processor': stored, 'chat_template': 'old'}
    (source / 'processor_config.json').write_text(json.dumps(joint))
    (source / 'preprocessor_config.json').unlink()
    mine = Processor(str(source), image_processor={'max_pixels': 6 * 28 * 28}, prompt_template='qwen_vl')
    mine.save(target)
    written = json.loads((target / 'processor_config.json').read_text())
    assert written['image_processor'] == json.loads((target / 'preprocessor_config.json').read_text())
    assert 'chat_template' not in written  # it would win over the tokenizer's
    assert AutoImageProcessor.from_pretrained(target).to_dict() == mine.image_processor.to_dict()


@pytest.mark.parametrize('name', ['llama', 'llava'])
def test_the_template_that_was_used_is_saved(name, processor, tmp_path, talk):
    mine = processor(name, prompt_template='vicuna', special_tokens=('<answer>',))
    mine.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{'role': 'user', 'content': 'Hi <answer>'}, {'role': 'assistant', 'content': 'Hello'}]
    assert tokenizer.chat_template == mine.tokenizer.chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith(
        'USER: Hi <answer> ASSISTANT: Hello' + tokenizer.eos_token
    )
    assert tokenizer.convert_tokens_to_ids('<answer>') == len(tokenizer) - 1
    assert tokenizer.get_vocab() == mine.tokenizer.get_vocab()
    assert (tmp_path / 'preprocessor_config.json').exists() == (name == 'llava')


def test_video_settings_are_copied(tiny_model, tmp_path):
    from vlmtune.data import Processor

    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    for file in tiny_model('qwen2_vl').iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / 'video_preprocessor_config.json').write_text('{"fps": 2}')
    Processor(str(source)).save(target)
    assert json.loads((target / 'video_preprocessor_config.json').read_text()) == {'fps': 2}
