"""Three-axis positions equal those that transformers computes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmtune.ops import mrope_positions, segment_lengths

FAMILIES = ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'qwen3_vl_moe', 'qwen3_5']
GRIDS = [(1, 4, 6), (1, 8, 2), (1, 2, 2), (1, 6, 10)]  # patches before merging by 2


@pytest.fixture(scope='module')
def theirs(tiny_model):
    """transformers' ``get_rope_index`` of a family; the weights do not matter."""

    def positions(family, ids, grids):
        config = AutoConfig.from_pretrained(tiny_model(family))
        with torch.device('meta'):
            model = AutoModelForImageTextToText.from_config(config)
        kinds = (ids == config.image_token_id).int()
        found, _ = model.model.get_rope_index(
            ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grids if len(grids) else None
        )
        return found[:, 0]

    return positions


def sequence(token, grids, *, gap=3):
    """Text, then every image followed by ``gap`` text tokens."""
    ids = [7] * 5
    for t, h, w in grids:
        ids += [token] * (t * h * w // 4) + [8] * gap
    return torch.tensor(ids), torch.tensor(grids, dtype=torch.long).reshape(-1, 3)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('images', [0, 1, 2, 3, 4])
@pytest.mark.parametrize('gap', [1, 3])
def test_equal_to_transformers(family, images, gap, tiny_model, theirs):
    token = AutoConfig.from_pretrained(tiny_model(family)).image_token_id
    ids, grids = sequence(token, GRIDS[:images], gap=gap)
    mine = mrope_positions(ids, image_token_id=token, image_grid_thw=grids, merge_size=2)
    assert mine.shape == (3, len(ids))
    assert mine.dtype == torch.long
    assert torch.equal(mine, theirs(family, ids, grids))


def test_an_image_takes_rows_and_columns_and_the_text_goes_on_behind_the_largest():
    ids = torch.tensor([1, 9, 9, 9, 9, 9, 9, 2])
    found = mrope_positions(ids, image_token_id=9, image_grid_thw=torch.tensor([[1, 4, 6]]), merge_size=2)
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


def test_images_side_by_side_and_at_both_ends():
    ids = torch.tensor([9, 9, 9, 9])
    grids = torch.tensor([[1, 2, 4], [1, 4, 2]])
    found = mrope_positions(ids, image_token_id=9, image_grid_thw=grids, merge_size=2)
    assert found.tolist() == [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]


@pytest.mark.parametrize('count', [0, 5, 7])
def test_tokens_and_grids_that_do_not_fit(count):
    with pytest.raises(ValueError, match=f'{count} image tokens but 1 grids that make 6'):
        mrope_positions(
            torch.tensor([9] * count + [1]), image_token_id=9, image_grid_thw=torch.tensor([[1, 4, 6]]), merge_size=2
        )


def test_segment_lengths_are_read_from_where_positions_restart():
    rows = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    assert segment_lengths(rows).tolist() == [3, 2, 1, 1, 5]
    axes = torch.stack([rows, *[torch.zeros_like(rows)] * 3])
    assert segment_lengths(axes).tolist() == [3, 2, 1, 1, 5]
