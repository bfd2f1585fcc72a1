"""Tiny models load through plain Auto classes, run on an image, and agree with their tokenizers and processors."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from vlmtune.testing import list_tiny_models, write_tiny_model

TEXT = ['llama', 'qwen2', 'qwen3']
VISION = [name for name in list_tiny_models() if name not in TEXT]
BUILDABLE = ['llava', 'llava_next', 'idefics3', 'gemma3', 'paligemma']  # processors that need no video processor
QUESTION = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is in the image?'}]}]


@pytest.fixture(scope='module')
def picture():
    return Image.radial_gradient('L').resize((90, 60)).convert('RGB')


def processor_of(path: Path):
    """The family's processor; one whose constructor asks for a video processor gets its attributes set by hand."""
    stored = json.loads((path / 'preprocessor_config.json').read_text())
    tokenizer, image_processor = AutoTokenizer.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    cls = getattr(transformers, stored['processor_class'])
    extra = path / 'processor_config.json'
    settings = json.loads(extra.read_text()) if extra.exists() else {}
    image_token = tokenizer.convert_ids_to_tokens(AutoConfig.from_pretrained(path).image_token_id)
    processor = object.__new__(cls)
    processor.__dict__.update(
        {
            'tokenizer': tokenizer,
            'image_processor': image_processor,
            'image_token': image_token,
            'start_image_token': '<img>',
            'end_image_token': '</img>',
            'fake_image_token': '<fake_token_around_image>',
            'global_image_token': '<global-img>',
            **{key: value for key, value in settings.items() if key != 'processor_class'},
        }
    )
    return processor


def inputs_for(name: str, path: Path, picture: Image.Image) -> dict[str, torch.Tensor]:
    if name in BUILDABLE:
        processor = AutoProcessor.from_pretrained(path)
        template = processor.tokenizer.chat_template
        text = processor.apply_chat_template(QUESTION, add_generation_prompt=True) if template else '<image>What?'
        return dict(processor(images=[picture], text=[text], return_tensors='pt'))
    processor = processor_of(path)
    text = processor.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    images = getattr(type(processor), 'images_kwargs', {})
    pixels, (expansion,) = processor._process_images([picture], **images, return_tensors='pt')
    assert text.count(processor.image_token) == 1
    ids = processor.tokenizer(text.replace(processor.image_token, expansion), return_tensors='pt').input_ids
    batch = {key: value for key, value in pixels.items() if key not in ('num_patches', 'rows', 'cols')} | {
        'input_ids': ids
    }
    if 'image_grid_thw' in batch:
        batch['mm_token_type_ids'] = (ids == AutoConfig.from_pretrained(path).image_token_id).int()
    return batch


def test_the_list_holds_every_family_once():
    assert len(VISION) == 14
    assert len(set(list_tiny_models())) == 17


@pytest.mark.parametrize('name', VISION)
def test_a_model_runs_on_an_image(name, tiny_model, picture):
    path = tiny_model(name)
    batch = inputs_for(name, path, picture)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert logits.shape == (*batch['input_ids'].shape, model.config.get_text_config().vocab_size)
    assert logits.isfinite().all()
    assert (batch['input_ids'] == model.config.image_token_id).sum() > 3
    assert len(AutoTokenizer.from_pretrained(path)) <= logits.shape[-1]


@pytest.mark.parametrize('name', VISION)
def test_the_image_matters(name, tiny_model, picture):
    path = tiny_model(name, amplify=4.0)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    other = picture.transpose(Image.Transpose.ROTATE_180).point(lambda value: 255 - value)
    with torch.no_grad():
        first, second = (model(**inputs_for(name, path, image), use_cache=False).logits for image in (picture, other))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize('name', TEXT)
def test_a_text_model_runs(name, tiny_model):
    path = tiny_model(name)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    text = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'Hello'}], tokenize=False, add_generation_prompt=True
    )
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors='pt'), use_cache=False).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize('name', list_tiny_models())
def test_token_ids_of_config_and_tokenizer_agree(name, tiny_model):
    path = tiny_model(name)
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    generation = transformers.GenerationConfig.from_pretrained(path)
    for role in ('bos', 'eos', 'pad'):
        expected = getattr(tokenizer, f'{role}_token_id')
        assert getattr(config.get_text_config(), f'{role}_token_id') == expected
        assert getattr(generation, f'{role}_token_id') == expected
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode(tokenizer('Naïve café: 12.5\n', add_special_tokens=False).input_ids) == 'Naïve café: 12.5\n'


@pytest.mark.parametrize('name', BUILDABLE)
def test_the_real_processor_loads_without_torchvision(name, tiny_model):
    processor = AutoProcessor.from_pretrained(tiny_model(name))
    stored = json.loads((tiny_model(name) / 'preprocessor_config.json').read_text())
    assert type(processor).__name__ == stored['processor_class']
    assert find_spec('torchvision') is not None or type(processor.image_processor).__name__.endswith('Pil')
    assert len(processor.tokenizer) <= AutoConfig.from_pretrained(tiny_model(name)).get_text_config().vocab_size


@pytest.mark.parametrize(
    ('name', 'prompt', 'answer'),
    [
        ('llama', '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>', 'Yes<|eot_id|>'),
        ('qwen3', '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', '<think>\n\n</think>\n\nYes<|im_end|>\n'),
        (
            'qwen2_5_vl',
            '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi',
            'Yes<|im_end|>\n',
        ),
        ('llava', 'USER: Hi ASSISTANT:', ' Yes '),
        ('internvl', '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', 'Yes<|im_end|>\n'),
        ('smolvlm', '<|im_start|>User: Hi<end_of_utterance>\nAssistant:', ' Yes<end_of_utterance>\n'),
        ('llava_onevision', '<|im_start|>user \nHi<|im_end|><|im_start|>assistant', ' \nYes<|im_end|>'),
        ('gemma3', '<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n', 'Yes<end_of_turn>\n'),
    ],
)
def test_templates_have_the_family_structure(name, prompt, answer, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(name))
    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes'}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith(prompt)
    assert text.endswith(answer)
    parts = [{'role': m['role'], 'content': [{'type': 'text', 'text': m['content']}]} for m in messages]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == text


@pytest.mark.parametrize(
    ('name', 'opening', 'eos'),
    [
        ('llama', '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>'),
        ('qwen2_vl', '<|im_end|>\n<|im_start|>assistant\n', '<|im_end|>'),
        ('qwen3', '<|im_end|>\n<|im_start|>assistant\n', '<|im_end|>'),
        ('llava', 'USER: Hi ASSISTANT:', '</s>'),
        ('internvl', '<|im_end|>\n<|im_start|>assistant\n', '<|im_end|>'),
        ('smolvlm', '<end_of_utterance>\nAssistant:', '<end_of_utterance>'),
        ('llava_onevision', '<|im_end|><|im_start|>assistant\n', '<|im_end|>'),
        ('gemma3', '<end_of_turn>\n<start_of_turn>model\n', '<eos>'),
    ],
)
def test_generation_prompts_and_end_tokens(name, opening, eos, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(name))
    messages = [{'role': 'user', 'content': 'Hi'}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith(opening)
    assert tokenizer.eos_token == eos


def test_weights_follow_seed_amplify_and_dtype(tmp_path):
    def weight(**kwargs) -> torch.Tensor:
        path = write_tiny_model('qwen2', tmp_path / repr(kwargs), **kwargs)
        return AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.up_proj.weight

    state = torch.get_rng_state()
    base = weight()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight(), base)
    assert not torch.equal(weight(seed=1), base)
    assert torch.equal(weight(amplify=4.0), base * 4)
    assert torch.equal(weight(dtype='bfloat16'), base.bfloat16())


@pytest.mark.parametrize('name', list_tiny_models())
def test_no_parameter_is_constant(name, tiny_model):
    with safe_open(tiny_model(name) / 'model.safetensors', 'pt') as file:
        constant = [key for key in file.keys() if file.get_tensor(key).unique().numel() == 1]  # noqa: SIM118
    assert constant == []


def test_overrides_reach_the_config(tmp_path):
    path = write_tiny_model('internvl', tmp_path, text_config={'num_hidden_layers': 1}, downsample_ratio=1.0)
    config = AutoConfig.from_pretrained(path)
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size, config.downsample_ratio) == (
        1,
        64,
        1.0,
    )


def test_variants_keep_the_model_type(tiny_model):
    configs = [AutoConfig.from_pretrained(tiny_model(name)) for name in ('internvl', 'internvl_llama')]
    assert [config.model_type for config in configs] == ['internvl', 'internvl']
    assert [config.text_config.model_type for config in configs] == ['qwen2', 'llama']


def test_the_same_call_writes_the_same_files(tmp_path):
    first, second = (write_tiny_model('smolvlm', tmp_path / side) for side in 'ab')
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_a_directory_is_small(tmp_path):
    for name in list_tiny_models():
        path = write_tiny_model(name, tmp_path / name)
        assert (path / 'model.safetensors').stat().st_size < 2_000_000


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no tiny model 'lava'; known are llama, "):
        write_tiny_model('lava', tmp_path)
