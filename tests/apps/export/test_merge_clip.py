"""What XTuner's users keep of a LLaVA besides a whole model: its vision encoder merged, its projector alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.cli import main
from vlmtune.models import load_model
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.errors import ConfigError

PROJECTOR = 'model.multi_modal_projector'


def seen(model: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 42 * 42).view(1, 3, 42, 42)
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).last_hidden_state


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A whole CLIP, an adapter on its vision encoder in XTuner's names, and what both see."""
    base = write_tiny_tower('clip', tmp_path / 'clip')
    adapted = get_peft_model(CLIPVisionModel.from_pretrained(base), LoraConfig(r=4, target_modules=['q_proj', 'fc1']))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    want = seen(adapted)
    adapted.save_pretrained(tmp_path / 'adapter')
    weights = tmp_path / 'adapter' / 'adapter_model.safetensors'
    from safetensors.torch import save_file

    renamed = {_as_xtuner(name): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, {'format': 'pt'})
    return base, tmp_path / 'adapter', want


def _as_xtuner(name: str) -> str:
    head = 'base_model.model.'
    inner = name.removeprefix(head)
    return name if inner.startswith('vision_model.') else f'{head}vision_model.{inner}'


def test_a_vision_encoder_is_merged_under_the_names_of_its_base(clip, tmp_path, capsys):
    base, adapter, want = clip
    out = tmp_path / 'out'
    assert main(['convert', 'merge', str(base), str(adapter), str(out), '--is-clip']) == 0
    assert (seen(CLIPVisionModel.from_pretrained(out)) - want).abs().max() < 1e-5
    assert (seen(CLIPVisionModel.from_pretrained(base)) - want).abs().max() > 1e-3
    old, new = (load_file(folder / 'model.safetensors') for folder in (base, out))
    assert old.keys() == new.keys()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        name for name in old if name.endswith(('q_proj.weight', 'fc1.weight')) and name.startswith('vision_model')
    }
    assert {'config.json', 'preprocessor_config.json'} <= {path.name for path in out.iterdir()}


def test_what_is_no_vision_encoder_is_refused(clip, tiny_model, tmp_path, capsys):
    base, adapter, _ = clip
    (tmp_path / 'key').write_text('private')
    with_link = shutil.copytree(base, tmp_path / 'with_link')
    (with_link / 'notes.txt').symlink_to(tmp_path / 'key')
    verb = ['convert', 'merge', '--is-clip']
    for arguments, message in (
        ([str(tiny_model('llama')), str(adapter), str(tmp_path / 'out')], 'is a llama, expected one of clip'),
        ([str(base), str(base), str(tmp_path / 'out')], 'expected a folder with adapter_config.json'),
        ([str(base), str(adapter), str(adapter)], 'is not empty'),
        ([str(with_link), str(adapter), str(tmp_path / 'out')], 'notes.txt is a link that leads out of'),
        ([str(base), str(adapter), str(tmp_path / 'out'), '--format', 'hf'], 'leave --format out'),
    ):
        assert main([*verb, *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / 'out').exists()


def test_a_projector_is_kept_alone_and_put_to_its_parts_again(trained_run, tiny_model, tmp_path):
    parts = dict(
        llm_name_or_path=str(tiny_model('qwen2')),
        visual_encoder_name_or_path=str(write_tiny_tower('clip', tmp_path / 'c')),
    )
    run = trained_run('llava', projector='full')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'out'), file_format='projector')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['projector']
    tensors = load_file(tmp_path / 'out' / 'projector' / 'model.safetensors')
    trained = run.model.named_trainable()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f'model.{2 * layer}.{leaf}': tuple(trained[f'{PROJECTOR}.linear_{layer + 1}.{leaf}'].shape)
        for layer in (0, 1) for leaf in ('weight', 'bias')
    }  # fmt: skip
    settings = json.loads((tmp_path / 'out' / 'projector' / 'config.json').read_text())
    assert (settings['model_type'], settings['depth'], settings['hidden_act']) == ('projector', 2, 'gelu')
    assert tensors['model.0.weight'].shape == (settings['llm_hidden_size'], settings['visual_hidden_size'])
    for place in (tmp_path / 'out', tmp_path / 'out' / 'projector'):
        model, _ = load_model({**parts, 'pretrained_pth': str(place)}, dtype=torch.float32)
        for name, tensor in trained.items():
            assert torch.equal(model.get_parameter(name), tensor)


def test_what_is_more_than_a_projector_is_not_kept_alone(trained_run, tmp_path):
    for run, message in (
        (trained_run('llava', llm='lora', projector='full'), 'also holds model.language_model.*leave --format out'),
        (trained_run('qwen2_5_vl', projector='full'), 'only a LLaVA has a projector that is kept alone'),
    ):
        with pytest.raises(ConfigError, match=message):
            pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'out'), file_format='projector')
        assert not (tmp_path / 'out').exists()
