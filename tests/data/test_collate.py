"""Joined rows keep samples apart by their positions; padded rows by their mask."""

from dataclasses import replace

import pytest
import torch

from vlmtune.data import Collator
from vlmtune.families import FAMILIES
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError


def sample(length, *, start=10, axes=None, **images):
    ids = torch.arange(start, start + length)
    positions = torch.arange(length) if axes is None else torch.arange(length).expand(axes, -1).clone()
    return dict(input_ids=ids, labels=ids.clone(), position_ids=positions, **images)


def collate(*samples, family='llama', pack=True, pad=99):
    return Collator(FAMILIES[family], pad_token_id=pad, pack=pack)(samples)


def test_joined():
    batch = collate(sample(3), sample(2, start=20))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        'input_ids': [[10, 11, 12, 20, 21]],
        'labels': [[IGNORE_INDEX, 11, 12, IGNORE_INDEX, 21]],
        'position_ids': [[0, 1, 2, 0, 1]],
    }


def test_joining_leaves_the_samples_alone():
    one = sample(3)
    collate(one, one)
    assert one['labels'].tolist() == [10, 11, 12]


def test_padded():
    batch = collate(sample(3), sample(2, start=20), pack=False)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        'input_ids': [[10, 11, 12], [20, 21, 99]],
        'labels': [[10, 11, 12], [20, 21, IGNORE_INDEX]],
        'attention_mask': [[1, 1, 1], [1, 1, 0]],
        'position_ids': [[0, 1, 2], [0, 1, 0]],
    }


@pytest.mark.parametrize(('pack', 'shape'), [(True, (4, 1, 5)), (False, (4, 2, 3))])
def test_positions_of_four_axes(pack, shape):
    batch = collate(sample(3, axes=4), sample(2, axes=4), family='qwen2_vl', pack=pack)
    assert batch['position_ids'].shape == shape
    assert batch['position_ids'][2, 0, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize('pack', [True, False])
def test_images_are_joined_in_order_along_the_familys_axis(pack):
    first, second = torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 4, 4)
    samples = sample(3, pixel_values=first), sample(2), sample(4, pixel_values=second)
    assert torch.equal(collate(*samples, family='llava', pack=pack)['pixel_values'], torch.cat([first, second]))
    rows = [dict(pixel_values=t[None], pixel_attention_mask=t[None, :, 0]) for t in (first, second)]
    batch = collate(sample(3, **rows[0]), sample(2, **rows[1]), family='smolvlm', pack=pack)
    assert batch['pixel_values'].shape == (1, 3, 3, 4, 4)
    assert batch['pixel_attention_mask'].shape == (1, 3, 4, 4)


@pytest.mark.parametrize('pack', [True, False])
def test_images_of_fewer_tiles_are_filled_up(pack):
    first, second = torch.ones(2, 3, 3, 4, 4), torch.ones(1, 5, 3, 4, 4)
    sizes = [torch.tensor([[30, 40], [50, 60]]), torch.tensor([[70, 80]])]
    samples = sample(3, pixel_values=first, image_sizes=sizes[0]), sample(4, pixel_values=second, image_sizes=sizes[1])
    batch = collate(*samples, family='llava_next', pack=pack)
    assert batch['pixel_values'].shape == (3, 5, 3, 4, 4)
    assert batch['pixel_values'].flatten(2).any(dim=-1).tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5]
    assert torch.equal(batch['image_sizes'], torch.cat(sizes))


def test_token_types_go_with_their_tokens():
    samples = sample(3, token_type_ids=torch.tensor([0, 1, 1])), sample(2, token_type_ids=torch.tensor([1, 0]))
    assert collate(*samples, family='gemma3', pack=True)['token_type_ids'].tolist() == [[0, 1, 1, 1, 0]]
    assert collate(*samples, family='gemma3', pack=False)['token_type_ids'].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_a_batch_without_images_has_no_image_inputs():
    assert 'pixel_values' not in collate(sample(3), sample(2), family='llava')


def test_a_family_that_cannot_be_packed():
    family = replace(FAMILIES['llama'], packing=False, no_packing_reason='it mixes neighbours')
    with pytest.raises(
        ConfigError, match=r'llama cannot keep packed samples apart \(it mixes neighbours\); set pack_to_max'
    ):
        Collator(family, pad_token_id=0, pack=True)
    Collator(family, pad_token_id=0, pack=False)
