"""Samples that share a row do not see each other: logits, losses and gradients are those of every sample alone.

The weights are amplified, so that logits reach about 3 and a leak is plain. Tolerance 1e-4: float32 sums of rows of
different length differ by about 2e-6 there; a leak is larger than 0.1.
"""

import pytest
import torch

from vlmtune.families import FAMILIES
from vlmtune.testing import list_tiny_models

TINY = [name for name in list_tiny_models() if name in FAMILIES or name == 'internvl_llama']
TEXT = ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma', 'granite', 'olmo2', 'phi3', 'smollm3']
VISION = [name for name in TINY if name not in TEXT]
ALL = [*TEXT, *VISION]


def logits_of(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != 'labels'}
    with torch.no_grad():
        return model.model(**inputs, use_cache=False).logits


def one_running_range(batch):
    """What an isolating call must not look like: positions that go on from sample to sample."""
    positions = batch['position_ids'].clone()
    positions[0] = torch.arange(positions.shape[-1])  # all of them, or the first of the four axes
    return {**batch, 'position_ids': positions}


def test_every_family_is_covered():
    assert len(TINY) == 12
    assert {*ALL, 'internvl_llama'} - {'internvl_llama'} == set(FAMILIES)


@pytest.mark.parametrize('name', ALL)
def test_packed_logits_are_those_alone_and_a_running_range_leaks(name, case):
    family = case(name)
    model = family.build().eval()
    alone = torch.cat([logits_of(model, family.batch(i))[0] for i in range(4)])
    packed = family.batch()
    assert packed['input_ids'].shape == (1, len(alone))
    assert 'attention_mask' not in packed
    assert (logits_of(model, packed)[0] - alone).abs().max() < 1e-4
    assert (logits_of(model, one_running_range(packed))[0] - alone).abs().max() > 0.1


@pytest.mark.parametrize('name', ALL)
def test_the_loss_of_a_pack_is_the_sum_of_its_samples(name, case):
    family = case(name)
    model = family.build().eval()
    with torch.no_grad():
        alone = sum(model(**family.batch(i)) for i in range(4))
        assert (model(**family.batch()) - alone).abs() < 1e-4 * alone
        assert (model(**family.batch(pack=False)) - alone).abs() < 1e-4 * alone


@pytest.mark.parametrize('name', ALL)
def test_padded_rows_are_those_alone(name, case):
    family = case(name)
    model = family.build().eval()
    padded = family.batch(pack=False)
    rows = logits_of(model, padded)
    for i in range(4):
        length = int(padded['attention_mask'][i].sum())
        assert (rows[i, :length] - logits_of(model, family.batch(i))[0]).abs().max() < 1e-4


@pytest.mark.parametrize('name', ALL)
def test_gradients_of_a_pack_are_the_sum_of_its_samples(name, case):
    """Every part trains. 1e-5 of the largest gradient of a tensor, and of all: float32 sums in another order."""
    family = case(name, amplify=1.0)
    model = family.build()

    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            model(**batch).backward()
        return {name: p.grad.clone() for name, p in model.named_trainable().items()}

    alone, packed = gradients(*(family.batch(i) for i in range(4))), gradients(family.batch())
    largest = max(grad.abs().max() for grad in alone.values())
    assert largest > 0.1
    for parameter, grad in alone.items():
        assert (packed[parameter] - grad).abs().max() < 1e-5 * largest, parameter


@pytest.mark.parametrize('name', VISION)
def test_a_sample_does_not_feel_its_neighbours_image(name, case):
    """Turning the first sample's picture black changes its own logits and no other's."""
    family = case(name)
    model = family.build().eval()
    black = [dict(sample) for sample in family.samples]
    black[0]['pixel_values'] = torch.zeros_like(black[0]['pixel_values']) + 0.1
    changed = type(family)(family.path, family.processor, black)
    before, after = (logits_of(model, f.batch())[0] for f in (family, changed))
    length = len(family.samples[0]['input_ids'])
    assert (before[:length] - after[:length]).abs().max() > 0.01
    assert (before[length:] - after[length:]).abs().max() < 1e-5  # exact zero but for kernels that depend on the shape
