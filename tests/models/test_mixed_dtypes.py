"""Parts that train are float32, parts that do not are bfloat16, and they meet in one forward pass."""

import pytest
import torch

FAMILIES_WITH_IMAGES = ['llava', 'qwen2_5_vl', 'qwen3_vl', 'internvl', 'smolvlm']
MIXTURES = {
    'vision full': dict(vision_encoder='full', projector='frozen', llm='lora'),
    'vision lora, llm full': dict(vision_encoder='lora', projector='frozen', llm='full'),
    'embeddings full': dict(llm='lora', embeddings='full', lm_head='full'),
    'projector full': dict(projector='full', llm='lora'),
}


@pytest.mark.parametrize('mixture', MIXTURES)
@pytest.mark.parametrize('name', FAMILIES_WITH_IMAGES)
def test_parts_of_different_dtypes_train_together(name, mixture, case):
    """Within 1 % of the float32 loss: bfloat16 has 8 bits of mantissa, measured are up to 0.3 %."""
    family = case(name, amplify=1.0)
    tune = MIXTURES[mixture]
    if mixture == 'embeddings full' and family.build().model.config.tie_word_embeddings:
        tune = dict(llm='lora', embeddings='full')
    exact = family.build(tune=tune)(**family.batch())
    model = family.build(tune=tune, dtype='bfloat16')
    loss = model(**family.batch())
    loss.backward()
    assert abs(loss - exact) / exact < 0.01
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.named_trainable().values())
