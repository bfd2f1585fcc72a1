"""Adapters of every kind that PEFT makes and merges, on bases of every kind that transformers reads."""

import json
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3NextConfig

from vlmtune.apps.export.merge import merge
from vlmtune.utils.errors import CheckpointError, ModelError

TIED = dict(tie_word_embeddings=True)
ATTENTION = dict(target_modules=['q_proj', 'v_proj'])
TOLERANCE = 2.5e-6  # of the largest logit, in float32: one product instead of two
# (family, options of the tiny model, settings of the adapter, whether embeddings and head are one tensor afterwards)
KINDS: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ('llama', TIED, dict(target_modules=['embed_tokens', 'q_proj']), False),
    ('llama', TIED, dict(target_modules=['lm_head', 'q_proj']), False),
    ('llama', TIED, dict(modules_to_save=['lm_head'], **ATTENTION), False),
    ('llama', TIED, dict(use_dora=True, **ATTENTION), True),
    ('llama', {}, dict(trainable_token_indices=[3, 7], **ATTENTION), False),
    ('qwen2', {}, dict(lora_bias=True, **ATTENTION), False),
    ('qwen2', {}, dict(rank_pattern={'q_proj': 2}, alpha_pattern={'v_proj': 32}, **ATTENTION), False),
    ('llama', TIED, dict(trainable_token_indices=[3, 7], **ATTENTION), True),
    ('qwen3_vl_moe', {}, ATTENTION, False),
    ('qwen2_5_vl', {}, dict(target_modules=['proj', 'gate_proj']), False),
]


def load(path: Any, family: str) -> Any:
    return (AutoModelForImageTextToText if '_vl' in family else AutoModelForCausalLM).from_pretrained(path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 25)[None], use_cache=False).logits


@pytest.fixture
def adapted(tiny_model, tmp_path):
    """``adapted(family, options, settings)``: folder of the base, and that of an adapter on it."""

    def make(family: str, options: dict[str, Any], settings: dict[str, Any]) -> Any:
        base = tiny_model(family, **options)
        model = get_peft_model(load(base, family), LoraConfig(r=4, **settings))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / 'adapter')
        return base, tmp_path / 'adapter', logits(model)

    return make


@pytest.mark.parametrize(
    ('family', 'options', 'settings', 'tied'), KINDS, ids=[f'{k[0]}-{i}' for i, k in enumerate(KINDS)]
)
def test_merged_it_says_what_it_said_unmerged(adapted, tmp_path, family, options, settings, tied):
    base, adapter, want = adapted(family, options, settings)
    assert (logits(load(base, family)) - want).abs().max() > 1e-3
    merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu')
    model = load(tmp_path / 'merged', family)
    assert (logits(model) - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max().item())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    names = [set(load_file(folder / 'model.safetensors')) for folder in (base, tmp_path / 'merged')]
    assert names[1] - names[0] == (set() if tied or not options else {'lm_head.weight'})


EXPERTS = dict(
    vocab_size=448, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16,
)  # fmt: skip


def test_experts_that_lie_apart_in_the_files_are_written_apart(tiny_model, tmp_path):
    """Modules hold them as one tensor: names and pieces of the files are put back."""
    base = shutil.copytree(tiny_model('qwen2'), tmp_path / 'base')
    model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**EXPERTS))
    model.save_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj', 'out_proj'], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / 'adapter')
    want = logits(adapted)
    merge(str(base), str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    old, new = (load_file(folder / 'model.safetensors') for folder in (base, tmp_path / 'merged'))
    assert any('.experts.2.up_proj.weight' in name for name in old)
    assert {name: tensor.shape for name, tensor in new.items()} == {name: tensor.shape for name, tensor in old.items()}
    assert all(torch.equal(new[name], old[name]) for name in old if 'expert' in name)
    merged = load(tmp_path / 'merged', 'qwen3_next')
    assert (logits(merged) - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max().item())


def test_a_base_that_is_quantised_is_refused(adapted, tmp_path):
    base, adapter, _ = adapted('llama', {}, ATTENTION)
    copy = tmp_path / 'base'
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps(config | dict(quantization_config=dict(quant_method='awq', bits=4))))
    with pytest.raises(ModelError, match='holds quantised weights; take the model that it was made from'):
        merge(str(copy), str(adapter), str(tmp_path / 'merged'), device='cpu')
    assert not (tmp_path / 'merged').exists()


@pytest.mark.parametrize(('change', 'match'), [
    (lambda tensors: tensors.pop('model.norm.weight'), r'1 weights are missing \(first: model.norm.weight\)'),
    (lambda tensors: tensors.update({'model.norm.weight': torch.ones(3)}), r'norm.weight is \(3,\), expected \(64,\)'),
])  # fmt: skip
def test_a_base_that_does_not_fit_its_config_is_refused(adapted, tmp_path, change, match):
    base, adapter, _ = adapted('llama', {}, ATTENTION)
    copy = tmp_path / 'base'
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / 'model.safetensors')
    change(tensors)
    save_file(tensors, copy / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ModelError, match=match):
        merge(str(copy), str(adapter), str(tmp_path / 'merged'), device='cpu')
    assert not (tmp_path / 'merged').exists()


def test_embeddings_that_grew_without_a_head_are_refused(adapted, tmp_path):
    """Rows that nobody trained have no values."""
    base, adapter, _ = adapted('llama', {}, dict(modules_to_save=['embed_tokens'], **ATTENTION))
    weights = adapter / 'adapter_model.safetensors'
    tensors = load_file(weights)
    name = 'base_model.model.model.embed_tokens.weight'
    tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_file(tensors, weights, {'format': 'pt'})
    with pytest.raises(CheckpointError, match='nothing trained brings lm_head.weight'):
        merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu')
    assert not (tmp_path / 'merged').exists()
