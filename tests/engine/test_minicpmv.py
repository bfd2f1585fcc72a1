"""MiniCPM-V 2.0 in the engine: what its own fine-tuning code leaves can be loaded, and its views are counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.engine.flops import ModelFlops
from vlmtune.engine.foreign_weights import check_loadable, open_source
from vlmtune.layouts import open_weights
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.errors import CheckpointError

TUNE = dict(
    vision_encoder='full',
    projector='full',
    embeddings='full',
    llm=dict(mode='lora', target_modules=['q_proj', 'k_proj', 'v_proj']),
)
SIZES = {'q_proj': 128, 'k_proj': 64, 'v_proj': 64}


@pytest.fixture(scope='module')
def model(tiny_model) -> SupervisedFinetune:
    return SupervisedFinetune(str(tiny_model('minicpmv2')), tune=TUNE, lora=dict(r=4, alpha=8), dtype='float32')


@pytest.fixture(scope='module')
def moved(tiny_model) -> dict[str, torch.Tensor]:
    """What the official code trains besides LoRA, by the names that PEFT gives it."""
    weights = {name: weight.read() for name, weight in open_weights(tiny_model('minicpmv2', seed=7)).items()}
    kept = ('vpm.', 'resampler.', 'llm.model.embed_tokens.')
    return {f'base_model.model.{name}': tensor for name, tensor in weights.items() if name.startswith(kept)}


def adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f'base_model.model.llm.model.layers.{layer}.self_attn.{name}.lora_{side}.weight': torch.randn(
            (4, 128) if side == 'A' else (size, 4), generator=generator
        )
        for layer in range(2)
        for name, size in SIZES.items()
        for side in 'AB'
    }


def write(folder: Path, *, inside: dict[str, Any], beside: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file(inside, folder / 'adapter_model.safetensors')
    (folder / 'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=4, lora_alpha=8)))
    if beside is not None:
        torch.save(beside, folder / 'vpm_resampler_embedtokens.pt')
    return folder


def names_of(loaded: Any, model: SupervisedFinetune) -> set[str]:
    assert loaded.lost == []
    return set(loaded.weights) ^ set(model.named_trainable())


def test_an_adapter_and_the_file_beside_it(model, moved, tmp_path: Path):
    """As the official code saved until July 2024; later, all of it is in the adapter's own file."""
    june = write(tmp_path / 'june', inside=adapter(), beside=moved)
    july = write(tmp_path / 'july', inside={**adapter(), **moved}, beside=None)
    check_loadable(june)
    first, second = open_source(june, model=model), open_source(july, model=model)
    assert names_of(first, model) == names_of(second, model) == set()
    for name, weight in first.weights.items():
        assert torch.equal(weight.read(), second.weights[name].read())
    qkv = moved['base_model.model.vpm.blocks.1.attn.qkv.weight']
    keys = first.weights['model.vision_tower.encoder.layers.1.self_attn.k_proj.weight']
    assert keys.shape == (32, 32)
    assert torch.equal(keys.read(), qkv[32:64])
    update = first.weights['model.language_model.layers.0.self_attn.k_proj.lora_B.default.weight']
    assert torch.equal(update.read(), adapter()['base_model.model.llm.model.layers.0.self_attn.k_proj.lora_B.weight'])


def test_the_file_alone(model, moved, tmp_path: Path):
    path = tmp_path / 'vpm_resampler_embedtokens.pt'
    torch.save(moved, path)
    check_loadable(path)
    left = names_of(open_source(path, model=model), model)
    assert left
    assert all('.lora_' in name for name in left)


def test_a_file_that_would_run_code_is_refused(moved, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return print, ('run',)

    folder = write(tmp_path / 'x', inside=adapter(), beside=moved)
    torch.save({'a': Evil()}, folder / 'vpm_resampler_embedtokens.pt')
    with pytest.raises(CheckpointError, match=r'vpm_resampler_embedtokens\.pt.*print'):
        check_loadable(folder)


def test_every_view_is_a_square_of_attention(model):
    grids = torch.tensor([[4, 8], [8, 5]])
    text = dict.fromkeys(('input_ids', 'labels', 'position_ids'), torch.arange(6)[None])
    batch = dict(text, pixel_bytes=torch.zeros(72, 3, 196, dtype=torch.uint8), patch_grids=grids)
    assert ModelFlops(model).rows(batch).images.tolist() == [32, 40]
