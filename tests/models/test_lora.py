"""LoRA reaches exactly the layers that were asked for."""

import re

import pytest
import torch
from torch import nn

from vlmtune.families import FAMILIES
from vlmtune.models.lora import names_to_regex
from vlmtune.models.tuning import part_of
from vlmtune.testing import list_tiny_models, list_tiny_originals
from vlmtune.utils.errors import ConfigError

ALL = [name for name in [*list_tiny_models(), *list_tiny_originals()] if name in FAMILIES or name == 'internvl_llama']
VISION = [name for name in ALL if name not in ('llama', 'qwen2', 'qwen3')]
# linear layers per part: LLM layers x 7 (experts are no linear layers: x 4), vision layers x what a layer has
LAYERS = {
    'llama': {'llm': 14},
    'qwen2': {'llm': 14},
    'qwen3': {'llm': 14},
    'llava': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 2},
    'qwen2_vl': {'llm': 14, 'vision_encoder': 2 * 4, 'projector': 2},
    'qwen2_5_vl': {'llm': 14, 'vision_encoder': 2 * 5, 'projector': 2},
    'qwen3_vl': {'llm': 21, 'vision_encoder': 3 * 4, 'projector': 3 * 2},
    'qwen3_vl_moe': {'llm': 12, 'vision_encoder': 3 * 4, 'projector': 3 * 2},
    'qwen3_5': {'llm': 2 * 3 + 5 + 4, 'vision_encoder': 3 * 4, 'projector': 2},
    'llava_next': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 2},
    'llava_onevision': {'llm': 14, 'vision_encoder': 3 * 6, 'projector': 2},
    'gemma3': {'llm': 14, 'vision_encoder': 2 * 6},  # its projector is a bare matrix
    'paligemma': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 1},
    'internvl': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 2},
    'internvl_llama': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 2},
    'minicpmv2': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 5},
    'points': {'llm': 14, 'vision_encoder': 2 * 4, 'projector': 2},
    'smolvlm': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 1},
    'idefics3': {'llm': 14, 'vision_encoder': 2 * 6, 'projector': 1},
}


def adapted(model):
    """Names of the adapted layers, by part."""
    found = {}
    for name, _ in model.model.named_modules():
        if name.endswith('.lora_A'):
            found.setdefault(model.part_of(name), []).append(name.removesuffix('.lora_A'))
            assert isinstance(model.model.get_submodule(name.removesuffix('lora_A') + 'base_layer'), nn.Linear)
    return found


def counts(model):
    return {part: len(names) for part, names in adapted(model).items()}


def test_all_families_are_counted():
    assert set(LAYERS) == set(ALL)


@pytest.mark.parametrize('name', ALL)
def test_llm_lora_reaches_every_linear_layer_of_the_llm_and_nothing_else(name, case):
    model = case(name).build(tune=dict(llm='lora'), lora=dict(r=2))
    assert counts(model) == {'llm': LAYERS[name]['llm']}
    assert all('.lora_' in parameter for parameter in model.named_trainable())


@pytest.mark.parametrize('name', VISION)
def test_every_part_that_asks_gets_lora(name, case):
    model = case(name).build(tune=dict.fromkeys(LAYERS[name], 'lora'), lora=dict(r=2))
    assert counts(model) == LAYERS[name]
    left = [
        n
        for n, m in model.model.named_modules()
        if isinstance(m, nn.Linear) and 'lora' not in n and 'base_layer' not in n
    ]
    head = {part_of(n, family=model.family) for n in left}
    assert head <= (
        {'lm_head', 'vision_encoder'} if name in ('llava', 'llava_next') else {'lm_head'}
    )  # layers never used


@pytest.mark.parametrize('name', VISION)
def test_vision_lora_alone(name, case):
    model = case(name).build(tune=dict(vision_encoder='lora'), lora=dict(r=2))
    assert counts(model) == {'vision_encoder': LAYERS[name]['vision_encoder']}


def test_a_fresh_adapter_changes_nothing_and_a_moved_one_does(case):
    family = case('llava')
    batch = family.batch()
    plain = family.build().eval()(**batch)
    model = family.build(tune=dict(llm='lora')).eval()
    assert abs(model(**batch) - plain) < 1e-6 * plain
    with torch.no_grad():
        for name, parameter in model.named_trainable().items():
            if 'lora_B' in name:
                parameter.add_(0.1)
    assert abs(model(**batch) - plain) > 1e-3 * plain


def test_parts_with_their_own_rank_alpha_and_targets(case):
    tune = dict(
        vision_encoder=dict(mode='lora', r=3, alpha=3, target_modules=['fc1']),
        llm=dict(mode='lora', target_modules=['q_proj', 'v_proj']),
    )
    model = case('llava').build(tune=tune, lora=dict(r=5, alpha=20))
    assert counts(model) == {'vision_encoder': 2, 'llm': 4}
    for part, names in adapted(model).items():
        for name in names:
            layer = model.model.get_submodule(name)
            expected = (3, 1.0) if part == 'vision_encoder' else (5, 4.0)
            assert (layer.r['default'], layer.scaling['default']) == expected
            assert name.rsplit('.', 1)[-1] in (['fc1'] if part == 'vision_encoder' else ['q_proj', 'v_proj'])


def test_parts_with_the_same_rank_and_another_alpha(case):
    tune = dict(projector=dict(mode='lora', alpha=8), llm='lora')
    model = case('qwen3_vl').build(tune=tune, lora=dict(r=4, alpha=4))
    scaling = {
        part: {model.model.get_submodule(n).scaling['default'] for n in names} for part, names in adapted(model).items()
    }
    assert scaling == {'projector': {2.0}, 'llm': {1.0}}


@pytest.mark.parametrize(('kind', 'extra'), [('use_dora', '.lora_magnitude_vector.'), ('use_rslora', None)])
def test_dora_and_rslora(kind, extra, case):
    family = case('llava')
    model = family.build(tune=dict(llm='lora'), lora={'r': 4, 'alpha': 4, kind: True})
    assert any(extra in name for name in model.named_trainable()) if extra else True
    layer = model.model.get_submodule(adapted(model)['llm'][0])
    assert layer.scaling['default'] == (2.0 if kind == 'use_rslora' else 1.0)
    model(**family.batch()).backward()
    assert all(p.grad is not None for p in model.named_trainable().values())


def test_dropout_acts_in_training_only(case):
    family = case('llama')
    model, batch = family.build(tune=dict(llm='lora'), lora=dict(r=4, dropout=0.5)), family.batch()
    with torch.no_grad():
        for name, parameter in model.named_trainable().items():
            parameter.add_(0.1 if 'lora_B' in name else 0.0)
    assert model.train()(**batch) != model(**batch)
    assert model.eval()(**batch) == model(**batch)


@pytest.mark.parametrize(
    ('tune', 'lora', 'message'),
    [
        (
            dict(llm=dict(mode='lora', target_modules=['qkv'])),
            {},
            r"tune.llm: target_modules \('qkv',\) match nothing; linear layers there are \['down_proj', 'gate_proj',",
        ),
        (
            dict(llm='lora', projector=dict(mode='lora', dropout=0.5)),
            {},
            'all parts in mode lora share dropout, use_dora and use_rslora',
        ),
    ],
)
def test_mistakes(tune, lora, message, case):
    with pytest.raises(ConfigError, match=message):
        case('llava').build(tune=tune, lora=lora)


@pytest.mark.parametrize('name', VISION)
def test_the_expression_matches_what_was_adapted_and_keeps_the_last_names_visible(name, case):
    model = case(name).build(tune=dict.fromkeys(LAYERS[name], 'lora'), lora=dict(r=2))
    expression = model.lora_config.target_modules
    names = {n for part in adapted(model).values() for n in part}
    plain = case(name).build(tune=dict(projector='full')).model
    assert {n for n, _ in plain.named_modules() if re.fullmatch(expression, n)} == names
    assert len(expression) < 800
    assert 'q_proj' in expression


def test_names_to_regex_matches_the_names_and_no_others():
    names = [f'a.layers.{i}.{last}' for i in (0, 1, 10) for last in ('q', 'v')] + ['a.fc', 'b.x.3.y.2.w', 'b.x.3.y.4.w']
    expression = names_to_regex(names)
    assert all(re.fullmatch(expression, name) for name in names)
    for other in ('a.layers.2.q', 'a.layers.0.k', 'a.layers.11.q', 'aXfc', 'a.fc2', 'b.x.2.y.2.w', 'x.a.fc'):
        assert not re.fullmatch(expression, other), other


def test_names_to_regex_where_layers_differ():
    names = ['m.0.q', 'm.1.q', 'm.1.v', 'b.0.y.1.w', 'b.1.y.0.w']
    expression = names_to_regex(names)
    every = [f'm.{i}.{n}' for i in range(3) for n in 'qv'] + [f'b.{i}.y.{j}.w' for i in range(2) for j in range(2)]
    assert {name for name in every if re.fullmatch(expression, name)} == set(names)
