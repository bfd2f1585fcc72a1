"""Every trainable weight gets a gradient from every batch, and weights that cannot get one do not train."""

import pytest
import torch

from vlmtune.families import FAMILIES
from vlmtune.structures import IGNORE_INDEX
from vlmtune.testing import list_tiny_models, list_tiny_originals

VISION = [
    name
    for name in [*list_tiny_models(), *list_tiny_originals()]
    if name == 'internvl_llama' or getattr(FAMILIES.get(name), 'has_vision', False)
]


@pytest.mark.parametrize('tune', ['full', 'lora'])
@pytest.mark.parametrize('name', VISION)
def test_every_trainable_weight_gets_a_gradient_from_a_batch_with_images(name, tune, case):
    family = case(name, amplify=1.0)
    model = family.build(tune=dict(vision_encoder=tune, projector='full', llm=tune), lora=dict(r=4), dtype='bfloat16')
    model(**family.batch(pack=family.processor.family.packing)).backward()
    assert [key for key, p in model.named_trainable().items() if p.grad is None] == []


@pytest.mark.parametrize('tune', ['full', 'lora'])
@pytest.mark.parametrize('name', VISION)
def test_a_text_only_batch_gives_the_vision_side_zeros(name, tune, case):
    """Zeros, not nothing: DDP would wait for a gradient that never comes."""
    family = case(name, amplify=1.0)
    model = family.build(tune=dict(vision_encoder=tune, projector='full', llm='full'), lora=dict(r=4))
    batch = family.batch(1, pack=family.processor.family.packing)
    assert 'pixel_values' not in batch
    model(**batch).backward()
    by_part = {}
    for key, parameter in model.named_trainable().items():
        by_part.setdefault(model.part_of(key), []).append(parameter.grad)
    assert all(grad is not None and grad.abs().max() == 0 for grad in by_part['vision_encoder'] + by_part['projector'])
    assert max(grad.abs().max() for grad in by_part['llm']) > 0


@pytest.mark.parametrize('name', ['llava_next', 'llava_onevision'])
def test_the_vector_that_ends_a_row_of_patches_trains_with_the_llm(name, case):
    """It is a parameter of no module of its own, which an adapter could not hold."""
    family = case(name, amplify=1.0)
    assert 'model.image_newline' not in family.build(tune=dict(llm='lora', projector='full')).named_trainable()
    model = family.build(tune=dict(llm='full'))
    newline = model.named_trainable()['model.image_newline']
    model(**family.batch()).backward()
    assert newline.grad.abs().max() > 0
    model.zero_grad()
    model(**family.batch(1)).backward()
    assert newline.grad.abs().max() == 0  # text only: zeros, not nothing


@pytest.mark.parametrize('name', ['llama', 'llava', 'qwen3_vl_moe'])
def test_a_filler_gives_every_weight_zeros(name, case):
    """The head and the embeddings as well."""
    family = case(name, amplify=1.0)
    model, batch = family.build(), family.batch()
    model(**{**batch, 'labels': torch.full_like(batch['labels'], IGNORE_INDEX)}).backward()
    trainable = model.named_trainable()
    assert any(model.part_of(key) == 'lm_head' for key in trainable)
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in trainable.values())


LAYERS = {-1: [], -2: [2], -3: [1, 2], 1: [1, 2], 2: [2]}


@pytest.mark.parametrize('layer', [*LAYERS, [-3, -2]])
def test_layers_behind_the_features_that_llava_reads_do_not_train(layer, case):
    family = case('llava', vision_feature_layer=layer, image_seq_length=9)
    model = family.build()
    unused = LAYERS.get(layer if isinstance(layer, int) else max(layer))
    frozen = {name for name, p in model.model.named_parameters() if not p.requires_grad}
    assert {name.split('.')[4] for name in frozen if '.layers.' in name} == {str(i) for i in unused}
    assert {name.split('.')[2] for name in frozen if '.layers.' not in name} == {'post_layernorm'}
    if isinstance(layer, int):  # a list makes the projector wider than this tiny one
        model(**family.batch()).backward()
        assert all(p.grad is not None for p in model.named_trainable().values())


def test_layers_behind_the_features_get_no_lora(case):
    model = case('llava').build(tune=dict(vision_encoder='lora'), lora=dict(r=2))
    adapted = {name.split('.')[4] for name in model.named_trainable()}
    assert adapted == {'0', '1'}


def test_siglips_pooling_head_does_not_train(case):
    siglip = dict(model_type='siglip_vision_model', num_hidden_layers=3, image_size=42, vision_use_head=True)
    model = case('llava', vision_config=siglip).build()
    frozen = {name.split('.')[2] for name, p in model.model.named_parameters() if not p.requires_grad}
    assert frozen == {'encoder', 'post_layernorm', 'head'}
