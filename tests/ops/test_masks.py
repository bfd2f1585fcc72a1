"""The masks are what the papers say, token by token, in packed rows, padded rows and single samples."""

from itertools import chain

import pytest
import torch
from transformers import AutoConfig

from vlmtune.ops.masks import two_way_images, two_way_prompts
from vlmtune.utils.errors import ConfigError

WINDOW = 3
IMAGES = [[0, 1, 1, 1, 1, 0, 1, 1, 0], [0, 0], [1, 1, 0, 0, 1]]  # token types of three samples
ANSWERS = [[0, 0, 0, 1, 1], [0, 1], [0, 0, 0, 0, 1, 1, 1]]


def config(name, *, attention='sdpa', **text):
    found = AutoConfig.for_model(name, text_config=text)
    found._attn_implementation = attention
    return found


def images_see(types, query, key):
    """Whether the token sees another one of its sample: it lies before, or in the same image."""
    low, high = sorted((query, key))
    return key <= query or all(types[low : high + 1])


def prompts_see(types, query, key):
    return key <= query or not (types[query] or types[key])


def dense(samples, sees, *, length, window=None):
    """bool[L, L], by asking for every pair; what is no sample sees itself."""
    mask = torch.eye(length, dtype=torch.bool)
    at = 0
    for types in samples:
        for query in range(len(types)):
            for key in range(len(types)):
                near = window is None or query - key < window
                mask[at + query, at + key] = sees(types, query, key) and near
        at += len(types)
    return mask


def packed(samples):
    positions = torch.cat([torch.arange(len(types)) for types in samples])[None]
    return dict(position_ids=positions, token_type_ids=torch.tensor([list(chain.from_iterable(samples))]))


def padded(samples):
    pad = torch.nn.utils.rnn.pad_sequence
    return dict(
        position_ids=pad([torch.arange(len(types)) for types in samples], batch_first=True),
        token_type_ids=pad([torch.tensor(types) for types in samples], batch_first=True),
        attention_mask=pad([torch.ones(len(types), dtype=torch.long) for types in samples], batch_first=True),
    )


def test_images_in_a_packed_row():
    masks = two_way_images(config('gemma3', sliding_window=WINDOW), **packed(IMAGES))
    assert set(masks) == {'full_attention', 'sliding_attention'}
    length = sum(map(len, IMAGES))
    assert masks['full_attention'].shape == (1, 1, length, length)
    assert torch.equal(masks['full_attention'][0, 0], dense(IMAGES, images_see, length=length))
    assert torch.equal(masks['sliding_attention'][0, 0], dense(IMAGES, images_see, length=length, window=WINDOW))


def test_prompts_in_a_packed_row():
    length = sum(map(len, ANSWERS))
    mask = two_way_prompts(config('paligemma'), **packed(ANSWERS))
    assert torch.equal(mask[0, 0], dense(ANSWERS, prompts_see, length=length))


@pytest.mark.parametrize('keep_positions', [True, False], ids=['positions of zero', 'positions that go on'])
def test_padded_rows(keep_positions):
    """Padding sees itself alone and nobody sees it, whatever its positions."""
    for name, samples, sees in (('gemma3', IMAGES, images_see), ('paligemma', ANSWERS, prompts_see)):
        rows = padded(samples)
        length = rows['position_ids'].shape[1]
        if not keep_positions:
            rows['position_ids'] = torch.arange(length).expand(3, -1)
        if name == 'gemma3':
            mask = two_way_images(config(name, sliding_window=100), **rows)['full_attention']
        else:
            mask = two_way_prompts(config(name), **rows)
        for row, types in enumerate(samples):
            assert torch.equal(mask[row, 0], dense([types], sees, length=length)), (name, row)


def test_a_single_sample_is_a_pack_of_one():
    mask = two_way_prompts(config('paligemma'), **packed(ANSWERS[:1]))
    assert torch.equal(mask[0, 0], dense(ANSWERS[:1], prompts_see, length=5))


def test_eager_attention_adds_its_mask():
    wanted = two_way_prompts(config('paligemma'), **packed(ANSWERS))
    added = two_way_prompts(config('paligemma', attention='eager'), **packed(ANSWERS), dtype=torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, wanted)
    assert added.min() == torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize('attention', ['flash_attention_2', 'flex_attention'])
def test_attention_without_masks_is_refused(attention):
    with pytest.raises(ConfigError, match=f"'{attention}': gemma.* needs a mask .* set attn_implementation='sdpa'"):
        two_way_images(config('gemma3', attention=attention), **packed(IMAGES))


def test_paligemma_2_up_to_its_window():
    found = config('paligemma', model_type='gemma2', sliding_window=WINDOW)
    assert two_way_prompts(found, **packed([[0, 0, 1], [0, 1]])).shape == (1, 1, 5, 5)
    with pytest.raises(
        ConfigError, match='a sample has 7 tokens, but paligemma .* window of 3 tokens; set max_length=3'
    ):
        two_way_prompts(found, **packed(ANSWERS))
