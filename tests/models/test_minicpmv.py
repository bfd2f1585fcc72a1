"""The resampler and the vision encoder of MiniCPM-V 2.0, by what torch's layers do; the whole is in tests/layouts."""

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig

from vlmtune.layouts import read_config
from vlmtune.models.minicpmv import MiniCPMVForGeneration
from vlmtune.models.resampler import Resampler, grid_positions
from vlmtune.models.slice_tower import SliceTower

GRIDS = [(5, 9), (4, 4), (2, 7)]


def random_weights(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.state_dict().values():
            weight.copy_(4 * torch.randn(weight.shape, generator=generator) / max(weight.shape[-1], 9) ** 0.5)
    return module.eval()


@pytest.fixture(scope='module')
def resampler() -> Resampler:
    return random_weights(Resampler(queries=9, features=24, size=256))


def test_several_heads_are_those_of_torch(resampler: Resampler):
    """The same sums, fused; they reach 20."""
    theirs = nn.MultiheadAttention(256, 2, batch_first=True)
    mine = resampler.attn
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([getattr(mine, f'{part}_proj').weight for part in 'qkv']))
        theirs.in_proj_bias.copy_(torch.cat([getattr(mine, f'{part}_proj').bias for part in 'qkv']))
        theirs.out_proj.load_state_dict(mine.out_proj.state_dict())
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (0.3 * torch.randn(2, length, 256, generator=generator) for length in (9, 20, 20))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    with torch.no_grad():
        expected = theirs(queries, keys, values, key_padding_mask=~mask)[0]
        torch.testing.assert_close(mine(queries, keys, values, mask), expected, atol=1e-4, rtol=1e-5)


def test_a_view_is_the_same_beside_others(resampler: Resampler):
    views = [torch.randn(rows * columns, 24) for rows, columns in GRIDS]
    together = nn.utils.rnn.pad_sequence(views, batch_first=True)
    mask = torch.arange(45) < torch.tensor([[len(view)] for view in views])
    with torch.no_grad():
        features = resampler(together, GRIDS, mask)
        for feature, view, grid in zip(features, views, GRIDS, strict=True):
            torch.testing.assert_close(feature, resampler(view[None], [grid])[0], atol=1e-4, rtol=1e-5)
            turned = resampler(view[None], [grid[::-1]])[0]
            assert grid[0] == grid[1] or (turned - feature).abs().max() > 0.1


def test_positions_tell_the_column_first():
    positions = grid_positions(2, 3, size=8, like=torch.zeros(1))
    angle = torch.tensor([2.0, 0.02])  # the third column; the second frequency is a hundredth
    assert positions.shape == (6, 8)
    torch.testing.assert_close(positions[2, :4], torch.cat([angle.sin(), angle.cos()]))
    torch.testing.assert_close(positions[2, 4:], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(positions[5, 4:], torch.tensor([1.0, 0.01, 1.0, 0.01]).sin().lerp(
        torch.tensor([1.0, 0.01, 1.0, 0.01]).cos(), torch.tensor([0.0, 0.0, 1.0, 1.0])))  # fmt: skip


def test_views_of_any_shape_are_encoded_together():
    settings = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    tower = random_weights(SliceTower(SiglipVisionConfig(**settings, image_size=56, patch_size=14)))
    views = [torch.randn(rows * columns, 588) for rows, columns in GRIDS]
    with torch.no_grad():
        together = tower(torch.cat(views), GRIDS).last_hidden_state
        assert together.shape == (3, 45, 32)
        for found, view, grid in zip(together, views, GRIDS, strict=True):
            alone = tower(view, [grid]).last_hidden_state[0]
            torch.testing.assert_close(found[: len(view)], alone, atol=1e-4, rtol=1e-5)


def test_a_fresh_model_has_the_positions_of_its_queries(tiny_model):
    model = MiniCPMVForGeneration(read_config(str(tiny_model('minicpmv2'))))
    projector = model.model.multi_modal_projector
    torch.testing.assert_close(projector.pos_embed, grid_positions(2, 2, size=128, like=torch.zeros(1)))
    assert projector.query.std() > 0
    assert projector.proj.std() > 0


def test_an_answer_goes_on_from_the_cache(case):
    """Tokens that come later carry no image, and their embeddings are multiplied as those of the prompt."""
    family = case('minicpmv2')
    model = family.build().eval()
    batch = {name: tensor for name, tensor in family.batch(0).items() if name not in ('labels', 'position_ids')}
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=2, eos_token_id=None)
    with torch.no_grad():
        cached = model.model.generate(**batch, **settings, use_cache=True)
        again = model.model.generate(**batch, **settings, use_cache=False)
    assert cached.shape[1] == batch['input_ids'].shape[1] + 4
    assert torch.equal(cached, again)
