"""Samples that share a row do not see each other: logits, losses and gradients are those of every sample alone.

The weights are amplified, so that logits reach about 3 and a leak is plain. Tolerance 1e-4: float32 sums of rows of
different length differ by about 2e-6 there; a leak is larger than 0.1.
"""

import pytest
import torch

from vlmtune.families import FAMILIES
from vlmtune.testing import list_tiny_models, list_tiny_originals
from vlmtune.utils.errors import ConfigError

TINY = [
    name
    for name in [*list_tiny_models(), *list_tiny_originals()]
    if name == 'internvl_llama' or (name in FAMILIES and FAMILIES[name].packing)
]
TEXT = ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma', 'gemma3_text', 'granite', 'olmo2', 'phi3', 'smollm3']
VISION = [name for name in TINY if name not in TEXT]
ALL = [*TEXT, *VISION]


def logits_of(model, batch):
    with torch.no_grad():
        return model.model(**model.model_inputs(batch), use_cache=False).logits


def one_running_range(batch):
    """What an isolating call must not look like: positions that go on from sample to sample."""
    positions = batch['position_ids'].clone()
    positions[0] = torch.arange(positions.shape[-1])  # all of them, or the first of the four axes
    return {**batch, 'position_ids': positions}


def test_every_family_is_covered():
    assert len(TINY) == 18
    assert set(ALL) - {'internvl_llama'} == {name for name, family in FAMILIES.items() if family.packing}


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


@pytest.mark.parametrize(
    ('name', 'overrides'), [('gemma3', dict(text_config=dict(sliding_window=16))), ('gemma3', {}), ('paligemma', {})]
)
def test_the_masks_of_transformers_would_leak(name, overrides, case):
    """Also with a window that is shorter than a sample; the layers of sliding attention have a mask of their own."""
    family = case(name, **overrides)
    model, packed = family.build().eval(), family.batch()
    alone = torch.cat([logits_of(model, family.batch(i))[0] for i in range(4)])
    with torch.no_grad():
        assert (model.model(**_without_labels(packed), use_cache=False).logits[0] - alone).abs().max() > 0.1
        own = torch.cat([model.model(**_without_labels(family.batch(i)), use_cache=False).logits[0] for i in range(4)])
    assert (logits_of(model, packed)[0] - own).abs().max() < 1e-4


def _without_labels(batch):
    return {key: tensor for key, tensor in batch.items() if key != 'labels'}


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


def changed_image(sample):
    return {**sample, 'pixel_values': torch.zeros_like(sample['pixel_values']) + 0.1}


def changed_text(sample):
    ids = sample['input_ids'].clone()
    ids[-1] = ids[-2] = 3  # the last of a sample stand right before the next one
    return {**sample, 'input_ids': ids}


@pytest.mark.parametrize(('name', 'change'), [*((n, changed_text) for n in ALL), *((n, changed_image) for n in VISION)])
def test_a_sample_does_not_feel_a_change_in_another(name, change, case):
    """The third sample has two images where the family has eyes; its neighbours on both sides stay as they are."""
    family = case(name)
    model = family.build().eval()
    samples = [*family.samples[:2], change(family.samples[2]), family.samples[3]]
    other = type(family)(family.path, family.processor, samples)
    before, after = (logits_of(model, f.batch())[0] for f in (family, other))
    lengths = [len(sample['input_ids']) for sample in samples]
    felt = [float((a - b).abs().max()) for a, b in zip(before.split(lengths), after.split(lengths), strict=True)]
    assert felt[2] > 0.01
    assert max(felt[0], felt[1], felt[3]) < 1e-5  # exact zero but for kernels that depend on the shape


# ---- families that cannot be packed

HYBRID = [name for name, family in FAMILIES.items() if not family.packing]


@pytest.mark.parametrize('name', HYBRID)
def test_a_family_with_state_is_refused_and_would_leak(name, case):
    """In one line that says why and what to do; it trains in rows of its own."""
    family = case(name)
    with pytest.raises(ConfigError) as error:
        family.batch()
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(f'pack_to_max_length: {name} cannot keep packed samples apart (its ')
    assert str(error.value).endswith('carry state from sample to sample); set pack_to_max_length=False')
    model = family.build().eval()
    first, second = (family.batch(i, pack=False) for i in (1, 0))
    joined = {key: torch.cat([first[key], second[key]], dim=-1) for key in ('input_ids', 'position_ids')}
    rest = {key: t for key, t in second.items() if key not in ('input_ids', 'position_ids', 'labels', 'attention_mask')}
    length = first['input_ids'].shape[1]
    together, alone = logits_of(model, {**joined, **rest})[0, length:], logits_of(model, second)[0]
    assert (together - alone).abs().max() > 0.1


@pytest.mark.parametrize('name', HYBRID)
def test_a_family_with_state_trains_in_padded_rows(name, case):
    family = case(name, amplify=1.0)
    model = family.build()
    losses = [model(**family.batch(i, pack=False)) for i in range(4)]
    together = model(**family.batch(pack=False))
    assert abs(together - sum(losses)) < 1e-5 * together
    together.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.named_trainable().values())
