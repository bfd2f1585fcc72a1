"""bitsandbytes reaches the language model's linear layers and nothing else. It runs on the CPU."""

import pytest
import torch
from torch import nn

from vlmtune.families import FAMILIES
from vlmtune.models.quantization import quantization_config
from vlmtune.testing import list_tiny_models, list_tiny_originals

ALL = [name for name in [*list_tiny_models(), *list_tiny_originals()] if name in FAMILIES or name == 'internvl_llama']
LINEAR = dict.fromkeys(ALL, 14) | {'qwen3_vl': 21, 'qwen3_vl_moe': 12, 'qwen3_5': 15}  # layers x 7; experts are none
KINDS = {'nf4': 'Linear4bit', 'int8': 'Linear8bitLt'}


def quantized(model):
    """PEFT's wrapper of a quantised layer has the name of its class, too; what it wraps is the layer."""
    found = {
        name.removesuffix('.base_layer') for name, m in model.named_modules() if type(m).__name__ in KINDS.values()
    }
    return sorted(found)


@pytest.mark.parametrize('quantization', KINDS)
@pytest.mark.parametrize('name', ALL)
def test_only_the_linear_layers_of_the_llm(name, quantization, case):
    family = case(name)
    model = family.build(quantization=quantization, tune=dict(llm='lora'), lora=dict(r=2), dtype='bfloat16')
    names = quantized(model.model)
    assert len(names) == LINEAR[name]
    assert {model.part_of(n) for n in names} == {'llm'}
    assert {type(model.model.get_submodule(n).base_layer).__name__ for n in names} == {KINDS[quantization]}
    plain = family.build(tune=dict(llm='lora'), lora=dict(r=2), dtype='bfloat16')
    others = {n: p for n, p in plain.model.named_parameters() if model.part_of(n) != 'llm'}
    mine = dict(model.model.named_parameters())
    assert all(torch.equal(parameter, mine[n]) for n, parameter in others.items())  # not one bit was touched


@pytest.mark.parametrize('quantization', KINDS)
@pytest.mark.parametrize('name', ['llama', 'llava', 'qwen2_5_vl', 'internvl', 'smolvlm'])
def test_it_trains(name, quantization, case):
    """Measured on these amplified weights: nf4 and int8 move the loss by up to 5 %."""
    family = case(name, amplify=1.0)
    tune = dict(llm='lora', **({'projector': 'full'} if family.processor.family.has_vision else {}))
    model = family.build(quantization=quantization, tune=tune, lora=dict(r=2), dtype='bfloat16')
    exact = family.build(tune=tune, lora=dict(r=2))(**family.batch())
    loss = model(**family.batch())
    assert abs(loss - exact) < 0.05 * exact
    loss.backward()
    assert all(p.grad is not None for p in model.named_trainable().values())
    assert any(p.grad.abs().max() > 0 for p in model.named_trainable().values())


def test_the_report_counts_weights_not_bytes(case):
    family = case('llava')
    plain = {row.part: row.parameters for row in family.build(tune=dict(llm='lora')).report()}
    packed = {row.part: row.parameters for row in family.build(tune=dict(llm='lora'), quantization='nf4').report()}
    assert packed == plain


def test_a_tied_head_stays_whole(case):
    model = case('qwen2', tie_word_embeddings=True).build(quantization='nf4', tune=dict(llm='lora'))
    assert type(model.model.lm_head) is nn.Linear
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_nf4_is_qloras_recipe():
    config = quantization_config('nf4', family=FAMILIES['llava'], dtype=torch.bfloat16)
    assert config.bnb_4bit_quant_type == 'nf4'
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(None, family=FAMILIES['llava'], dtype=torch.bfloat16) is None
