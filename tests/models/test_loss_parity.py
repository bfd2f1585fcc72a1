"""Our head and loss against the model's own ``labels=`` loss, in one model: the loss and every gradient.

Everything below the head is the same computation, so what differs is the order of float32 sums: 1e-6 of the loss, 1e-5
of the largest gradient. In bfloat16 the gradient of the logits is rounded at another place: 2**-8 of the largest.
"""

import pytest
import torch

from vlmtune.families import FAMILIES
from vlmtune.structures import IGNORE_INDEX

LORA = dict(tune=dict(llm='lora'), lora=dict(r=4))
SETTINGS = {
    'lora': LORA,
    'dora': dict(tune=dict(llm='lora'), lora=dict(r=4, use_dora=True)),
    'nf4': dict(LORA, quantization='nf4'),
    'int8': dict(LORA, quantization='int8'),
    'checkpointing': dict(gradient_checkpointing=True),
    'projector': dict(tune=dict(projector='full')),
    'bfloat16': dict(dtype='bfloat16'),
}


def both(model, batch):
    """(loss, gradients) of ours and of the model's own, sums over the supervised tokens."""
    count = (batch['labels'][:, 1:] != IGNORE_INDEX).sum()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_trainable().items()}

    yield gradients(model(**batch))
    with torch.autocast('cpu', dtype=model.dtype, enabled=model.dtype != torch.float32):
        own = model.model(**model.model_inputs(batch), labels=batch['labels'], use_cache=False).loss
    yield gradients(own * count)


def assert_equal(model, batch, *, loss, gradient):
    (mine, my_gradients), (theirs, their_gradients) = both(model.train(), batch)
    assert abs(mine - theirs) < loss * theirs
    largest = max(grad.abs().max() for grad in their_gradients.values())
    assert largest > 1e-3
    for name, grad in their_gradients.items():
        assert (my_gradients[name] - grad).abs().max() < gradient * largest, name


@pytest.mark.parametrize('name', [*FAMILIES])
def test_in_every_family(name, case):
    family = case(name, amplify=1.0)
    batch = family.batch(0, pack=FAMILIES[name].packing)
    assert_equal(family.build(), batch, loss=1e-6, gradient=1e-5)


@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize('name', ['llava', 'qwen2_5_vl'])
def test_however_it_is_tuned(name, settings, case):
    family = case(name, amplify=1.0)
    is_float32 = settings.get('dtype') is None
    tolerances = dict(loss=1e-6, gradient=1e-5) if is_float32 else dict(loss=1e-4, gradient=2**-8)
    assert_equal(family.build(**settings), family.batch(), **tolerances)


@pytest.mark.parametrize('name', ['llama', 'qwen2_vl'])
def test_where_head_and_embeddings_are_one(name, case):
    overrides = dict(text_config=dict(tie_word_embeddings=True)) if name == 'qwen2_vl' else {}
    family = case(name, amplify=1.0, tie_word_embeddings=True, **overrides)
    model = family.build()
    assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    assert_equal(model, family.batch(), loss=1e-6, gradient=1e-5)
