"""LLaVA from parts as its users go: a projector first, then instructions in 4 bits, one plain model at the end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.tested_model import load_tested
from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.engine.checkpoint import verify
from vlmtune.evaluation.generation import encode_prompt, prompt_inputs
from vlmtune.models import SupervisedFinetune, load_model
from vlmtune.registry import MODELS
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.errors import CheckpointError, ConfigError

FIRST, SECOND = 'llava_internlm2_1_8b_projector_lcs558k', 'llava_internlm2_1_8b_qlora_mix665k'
PROJECTOR = 'model.multi_modal_projector'
TOLERANCE = 2.5e-6  # of the largest logit, in float32: one product instead of two


class Flow:
    """Both stages, trained: settings of the tiny run, and the work dirs."""

    def __init__(self, root: Path, *, llm: Path, data: Any) -> None:
        self.root, self.image = root, str(sorted(data.image_folder.iterdir())[0])
        self.settings: dict[str, Any] = dict(
            llm_name_or_path=llm,
            visual_encoder_name_or_path=write_tiny_tower('clip', root / 'clip'),
            data_path=data.data_path,
            image_folder=data.image_folder,
            evaluation_images=[self.image, self.image],
            dataloader_num_workers=0,
            plan_cache_dir=root / 'plans',
        )

    def train(self, recipe: str, *arguments: str, epochs: int = 1, **settings: Any) -> Path:
        work_dir = self.root / recipe
        options = {**self.settings, 'max_epochs': epochs, **settings}
        given = [f'{key}={value}' for key, value in options.items()]
        assert main(['train', recipe, '--work-dir', str(work_dir), *arguments, '--cfg-options', *given]) == 0
        verify(work_dir / f'iter_{epochs}.pth')
        return work_dir

    def conversation(self) -> Conversation:
        parts = (ImagePart(0), TextPart('What is shown?'))
        return Conversation((Message('user', parts),), (ImageRef(path=self.image),))


@pytest.fixture(scope='module')
def flow(tiny_model: Callable, tiny_data: Callable, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    root = tmp_path_factory.mktemp('llava')
    flow = Flow(root, llm=tiny_model('internlm2'), data=tiny_data('llava', rows=4))
    first = flow.train(FIRST)
    for epochs, arguments in ((1, ()), (2, ('--resume',))):
        flow.train(SECOND, *arguments, epochs=epochs, pretrained_pth=first, dtype='float32')
    return flow


def trained_model(checkpoint: Path) -> SupervisedFinetune:
    cfg = load_config(checkpoint / 'config.py')
    model: SupervisedFinetune = MODELS.build(cfg.model, default_args=dict(device='cpu'))
    model.load_trainable(load_file(checkpoint / 'model.safetensors'))
    return model.eval()


def test_the_second_stage_begins_with_the_projector_of_the_first(flow: Flow):
    cfg = load_config(flow.root / SECOND / 'iter_2.pth' / 'config.py')
    parts = cfg.model.pretrained_model_name_or_path
    assert parts.pretrained_pth == str(flow.root / FIRST)
    model, _ = load_model(parts, dtype=torch.float32)
    learned = load_file(flow.root / FIRST / 'iter_1.pth' / 'model.safetensors')
    assert {name.rpartition('.')[0] for name in learned} == {f'{PROJECTOR}.linear_1', f'{PROJECTOR}.linear_2'}
    for name, tensor in learned.items():
        assert torch.equal(model.get_parameter(name), tensor)
    new, _ = load_model({**parts, 'pretrained_pth': None}, dtype=torch.float32)
    assert not torch.equal(new.get_parameter(name), tensor)  # it did learn
    again = load_file(flow.root / SECOND / 'iter_2.pth' / 'model.safetensors')
    assert not torch.equal(again[name], tensor)  # and so did the second stage


def test_it_becomes_one_plain_llava_that_chats(flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture):
    checkpoint, out = flow.root / SECOND / 'iter_2.pth', tmp_path / 'out'
    pth_to_hf(SECOND, str(checkpoint), str(out), dtype='float32', device='cpu')
    assert not (out / 'adapter_config.json').exists()
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.text_config.model_type) == ('llava', 'llama')
    plain, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())

    trained, processor = trained_model(checkpoint), Processor(str(out))
    inputs = prompt_inputs(processor, [encode_prompt(processor, flow.conversation())])
    with torch.no_grad():
        want = trained.model(**inputs, use_cache=False).logits
        found = plain(**inputs, use_cache=False).logits
    assert (found - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max().item())
    own = load_model(trained_parts(flow), dtype=torch.float32)[0].eval()
    with torch.no_grad():
        assert (own(**inputs, use_cache=False).logits - want).abs().max() > 100 * TOLERANCE  # the parts, untrained

    said = load_answerer(str(out), settings=dict(max_new_tokens=4))
    said.answer(flow.conversation(), lambda piece: None)


def trained_parts(flow: Flow) -> dict[str, Any]:
    return dict(load_config(flow.root / SECOND / 'iter_2.pth' / 'config.py').model.pretrained_model_name_or_path)


def test_the_files_beside_its_weights(flow: Flow, tmp_path: Path):
    out = tmp_path / 'out'
    pth_to_hf(FIRST, str(flow.root / FIRST / 'iter_1.pth'), str(tmp_path / 'first'))
    pth_to_hf(SECOND, str(flow.root / SECOND / 'iter_2.pth'), str(out))
    image = json.loads((out / 'preprocessor_config.json').read_text(encoding='utf-8'))
    assert (image['image_processor_type'], image['do_pad']) == ('LlavaImageProcessor', True)
    image = json.loads((tmp_path / 'first' / 'preprocessor_config.json').read_text(encoding='utf-8'))
    assert image['image_processor_type'] == 'CLIPImageProcessor'
    joint = json.loads((out / 'processor_config.json').read_text(encoding='utf-8'))
    assert (joint['processor_class'], joint['patch_size'], joint['num_additional_image_tokens']) == (
        'LlavaProcessor', 14, 1
    )  # fmt: skip
    card = (out / 'README.md').read_text(encoding='utf-8')
    assert ' + clip' in card
    assert 'vlmtune-llava-' not in card


def test_answers_to_test_are_those_of_one_projector(flow: Flow, tmp_path: Path):
    """What ``vlmtune test`` knows a model by changes with each file that ``pretrained_pth`` may name."""
    folder, file = tmp_path / 'folder', tmp_path / 'mm_projector.bin'
    shutil.copytree(flow.root / FIRST, folder)
    inside = folder / 'iter_1.pth' / 'model.safetensors'
    learned = load_file(inside)
    places = {'linear_1': 'model.mm_projector.0', 'linear_2': 'model.mm_projector.2'}
    torch.save({f'{places[name.split(".")[-2]]}.{name.split(".")[-1]}': learned[name] for name in learned}, file)
    for named, changed in ((folder, inside), (file, file)):
        parts = {**trained_parts(flow), 'pretrained_pth': str(named)}
        key = load_tested(Config(dict(processor={})), parts).key
        assert load_tested(Config(dict(processor={})), parts).key == key
        os.utime(changed, ns=(0, 0))
        assert load_tested(Config(dict(processor={})), parts).key != key


def test_there_is_no_original_to_write(flow: Flow, tmp_path: Path):
    with pytest.raises(ConfigError, match='--format original'):
        pth_to_hf(FIRST, str(flow.root / FIRST / 'iter_1.pth'), str(tmp_path / 'out'), file_format='original')
    assert not (tmp_path / 'out').exists()


def test_a_processor_that_reads_images_otherwise_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ['model.pretrained_model_name_or_path.pad_image_to_square=True', 'data_path=/no/data.json']
    assert main(['train', FIRST, '--work-dir', str(tmp_path), '--cfg-options', *options]) == 1
    assert 'error: pad_image_to_square is True in model.pretrained' in capsys.readouterr().err


def test_a_first_stage_that_has_moved_is_found_where_the_config_says(flow: Flow, tmp_path: Path):
    checkpoint, recipe = flow.root / SECOND / 'iter_2.pth', tmp_path / 'recipe.py'
    pth_to_hf(SECOND, str(checkpoint), str(tmp_path / 'before'), dtype='float32')
    text = (checkpoint / 'config.py').read_text(encoding='utf-8')
    moved = (flow.root / FIRST).rename(flow.root / 'moved')
    recipe.write_text(text.replace(str(flow.root / FIRST), str(moved)), 'utf-8')
    try:
        with pytest.raises(CheckpointError, match=f'{FIRST} does not exist'):
            pth_to_hf(SECOND, str(checkpoint), str(tmp_path / 'after'))
        pth_to_hf(str(recipe), str(checkpoint), str(tmp_path / 'after'), dtype='float32')
    finally:
        moved.rename(flow.root / FIRST)
    before, after = (load_file(tmp_path / name / 'model.safetensors') for name in ('before', 'after'))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
