"""Chats with the folders that XTuner writes of a LLaVA; tests/layouts compares their logits with XTuner's own."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlmtune.apps.chat import chat
from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.chat.llava_folder import llava_parts
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.errors import CheckpointError, ConfigError

QUESTION = 'What is shown?'


@pytest.fixture(scope='module')
def parts(tiny_model, tmp_path_factory):
    """``llm``, ``clip``, ``llava/projector`` and two pictures."""
    root = tmp_path_factory.mktemp('xtuner')
    llm = tiny_model('internlm2', amplify=4.0)
    width = json.loads((llm / 'config.json').read_text(encoding='utf-8'))['hidden_size']
    write_tiny_tower('clip', root / 'clip')
    folder = root / 'llava' / 'projector'
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    shapes = {'0.weight': (width, 32), '0.bias': (width,), '2.weight': (width, width), '2.bias': (width,)}
    save_file(
        {f'model.{name}': torch.randn(shape, generator=random) for name, shape in shapes.items()},
        folder / 'model.safetensors',
        {'format': 'pt'},
    )
    (folder / 'config.json').write_text(json.dumps(dict(model_type='projector', depth=2)), encoding='utf-8')
    for name, colour in (('red', 'red'), ('blue', 'blue')):
        Image.new('RGB', (60, 40), colour).save(root / f'{name}.png')
    return llm, root


def test_it_chats_with_pictures(parts, capsys):
    llm, root = parts

    def answer(picture):
        chat(
            str(llm),
            visual_encoder=str(root / 'clip'),
            llava=str(root / 'llava'),
            images=[str(root / picture)],
            prompt=QUESTION,
            prompt_template='internlm2_chat',
            max_new_tokens=8,
        )
        return capsys.readouterr().out

    assert answer('red.png') == answer('red.png') != answer('blue.png')


def test_pictures_are_padded_as_in_xtuner_and_the_layer_is_the_asked_one(parts):
    llm, root = parts
    found = llava_parts(str(llm), llava=str(root / 'llava'), visual_encoder=str(root / 'clip'), visual_select_layer=-3)
    answerer = load_answerer(found)
    assert answerer.processor.image_processor.do_pad
    assert answerer.model.config.vision_feature_layer == -3
    weight = answerer.model.get_parameter('model.multi_modal_projector.linear_1.weight')
    assert torch.equal(weight.float(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def test_a_trained_vision_encoder_lies_in_the_folder(parts, tmp_path):
    llm, root = parts
    shutil.copytree(root / 'llava', tmp_path / 'llava')
    shutil.copytree(root / 'clip', tmp_path / 'llava' / 'visual_encoder')
    found = llava_parts(str(llm), llava=str(tmp_path / 'llava'), visual_encoder=None)
    assert found['visual_encoder_name_or_path'] == str(tmp_path / 'llava' / 'visual_encoder')
    assert load_answerer(found).processor.family.has_vision
    with pytest.raises(ConfigError, match='holds a trained visual_encoder; leave it out'):
        llava_parts(str(llm), llava=str(tmp_path / 'llava'), visual_encoder=str(root / 'clip'))


def test_what_is_missing_is_told_before_anything_is_loaded(parts, tmp_path):
    llm, root = parts
    clip, llava = str(root / 'clip'), str(root / 'llava')
    cases = [
        (dict(llava=llava), ConfigError, 'holds no visual_encoder; add --visual-encoder'),
        (dict(visual_encoder=clip), ConfigError, 'expected --llava DIR beside it'),
        (dict(llava=clip, visual_encoder=clip), CheckpointError, 'expected the folder projector in it'),
        (dict(llava=str(tmp_path / 'none'), visual_encoder=clip), CheckpointError, 'neither a folder nor found'),
        (dict(llava=llava, visual_encoder=clip, adapter='a'), ConfigError, '--adapter and --llava'),
    ]
    for settings, error, match in cases:
        with pytest.raises(error, match=match):
            chat(str(llm), prompt=QUESTION, **settings)
