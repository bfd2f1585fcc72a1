"""Noise on the embeddings: the paper's bound for every sample, in training only, from the global generator."""

import pytest
import torch

from vlmtune.models.neftune import EmbeddingNoise


def embed(batch, *, training=True, alpha=10.0):
    embeddings = torch.nn.Embedding(10, 16).train(training)
    clean = embeddings(batch['input_ids'])
    noise = EmbeddingNoise(embeddings, alpha=alpha)
    with noise.during(batch):
        return embeddings(batch['input_ids']) - clean, embeddings, clean


PACKED = dict(input_ids=torch.arange(100)[None] % 10, position_ids=torch.cat([torch.arange(4), torch.arange(96)])[None])
PADDED = dict(
    input_ids=torch.arange(192).view(2, 96) % 10,
    attention_mask=torch.cat([torch.ones(2, 4), torch.stack([torch.zeros(92), torch.ones(92)])], dim=1).long(),
)


@pytest.mark.parametrize(
    ('batch', 'short', 'long'),
    [(PACKED, (0, slice(4)), (0, slice(4, 100))), (PADDED, (0, slice(4)), (1, slice(None)))],
    ids=['packed', 'padded'],
)
def test_each_sample_has_the_bound_of_its_own_length(batch, short, long):
    """alpha / sqrt(L * D): 10 / sqrt(4 * 16) and 10 / sqrt(96 * 16); of many uniform draws the largest is near it."""
    noise, _, _ = embed(batch)
    for where, bound in ((short, 1.25), (long, 10 / (96 * 16) ** 0.5)):
        assert 0.9 * bound < noise[where].abs().max() <= bound + 1e-6
        assert noise[where].mean().abs() < 0.2 * bound


def test_none_in_evaluation_and_none_outside_of_a_training_batch():
    assert embed(PACKED, training=False)[0].abs().max() == 0
    _, embeddings, clean = embed(PACKED)
    assert torch.equal(embeddings(PACKED['input_ids']), clean)


@pytest.mark.parametrize('name', ['llama', 'qwen2_5_vl', 'smolvlm'])
def test_a_model_trains_with_noise_and_repeats_with_the_generator(name, case):
    family = case(name)
    model = family.build(neftune_noise_alpha=10.0).train()
    state = torch.get_rng_state()
    first, second = model(**family.batch()), model(**family.batch())
    torch.set_rng_state(state)
    assert torch.equal(model(**family.batch()), first)
    assert second != first
    plain = family.build()
    assert torch.equal(model.eval()(**family.batch()), plain.eval()(**family.batch()))


def test_checkpointing_sees_the_same_noise(case):
    family = case('llama', amplify=1.0)
    found = []
    for checkpointing in (False, True):
        model = family.build(neftune_noise_alpha=10.0, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        model(**family.batch()).backward()
        found.append({name: p.grad for name, p in model.named_trainable().items()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
