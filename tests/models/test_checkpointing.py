"""Gradient checkpointing is a part's own setting, or the model's; it changes no gradient."""

import pytest
import torch

from vlmtune.utils.errors import ConfigError


def checkpointed(model):
    """The parts in which layers recompute."""
    inner = model.model
    towers = dict(vision_encoder=inner.model.vision_tower, llm=inner.model.language_model)
    return {
        part for part, tower in towers.items() if any(getattr(m, 'gradient_checkpointing', 0) for m in tower.modules())
    }


ON, OFF = dict(mode='full', gradient_checkpointing=True), dict(mode='full', gradient_checkpointing=False)


@pytest.mark.parametrize(
    ('tune', 'everywhere', 'expected'),
    [
        (dict(vision_encoder='full', llm='full'), True, {'vision_encoder', 'llm'}),
        (dict(vision_encoder='full', llm='full'), False, set()),
        (dict(vision_encoder=ON, llm='full'), False, {'vision_encoder'}),
        (dict(vision_encoder=OFF, llm='full'), True, {'llm'}),
        (dict(vision_encoder='full', llm=OFF), True, {'vision_encoder'}),
        (dict(llm='lora'), True, {'llm'}),  # a frozen tower keeps no activations
        (dict(projector='full'), True, {'llm'}),  # gradients pass through a frozen language model
        (dict(llm=dict(mode='lora', gradient_checkpointing=True, r=2)), False, {'llm'}),
    ],
)
def test_who_recomputes(tune, everywhere, expected, case):
    model = case('llava').build(tune=tune, gradient_checkpointing=everywhere)
    assert checkpointed(model) == expected
    assert {part for part, plan in model.plans.items() if plan.gradient_checkpointing} == expected


@pytest.mark.parametrize('tune', [dict(vision_encoder=ON, llm=OFF), dict(vision_encoder=OFF, llm=ON)])
def test_one_part_alone_changes_no_gradient(tune, case):
    family = case('llava', amplify=1.0)
    found = []
    for settings in (tune, dict(vision_encoder='full', llm='full')):
        model = family.build(tune=settings).train()
        model(**family.batch()).backward()
        found.append({name: p.grad for name, p in model.named_trainable().items()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_frozen_tower_keeps_no_activations(case):
    """Nothing in it or before it trains, so autograd saves nothing: no_grad would spare no memory."""
    family = case('llava')
    model = family.build(tune=dict(llm='lora')).train()
    tower, batch = model.model.model.vision_tower, family.batch()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        features = tower(batch['pixel_values']).last_hidden_state
    assert not saved
    assert not features.requires_grad


@pytest.mark.parametrize(
    ('tune', 'message'),
    [
        (dict(projector=ON), 'tune.projector: gradient_checkpointing=True; expected .* for vision_encoder and llm'),
        (dict(llm=dict(mode='full', gradient_checkpointing='yes')), "tune.llm: gradient_checkpointing='yes'; expected"),
    ],
)
def test_mistakes(tune, message, case):
    with pytest.raises(ConfigError, match=message):
        case('llava').build(tune=tune)
