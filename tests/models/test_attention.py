"""Our attention gives what transformers' own sdpa gives, in every family, and is used only where rows are packed."""

import pytest
import torch

from vlmtune.families import FAMILIES
from vlmtune.models.attention import describe_attention
from vlmtune.ops.attention import Segments

NAMES = ['llama', 'qwen2', 'mistral', 'phi3', 'granite', 'smollm3', 'llava', 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl',
         'qwen3_vl_moe', 'internvl', 'smolvlm']  # fmt: skip
OURS, TOWER = 'sdpa, sample by sample', 'sdpa, windows of one size together'


def as_transformers(model):
    """The same model with transformers' own function everywhere."""
    model.model.set_attn_implementation('sdpa')
    return model


def loss_and_gradients(model, batch):
    loss = model(**batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_trainable().items()}


@pytest.mark.parametrize('name', NAMES)
def test_packed_rows_have_the_loss_and_gradients_of_transformers_sdpa(name, case):
    """1e-5 of the largest gradient: sums over a sample instead of over a masked row. Mistral's window is shorter."""
    family = case(name, amplify=1.0)
    mine = loss_and_gradients(family.build(), family.batch())
    theirs = loss_and_gradients(as_transformers(family.build()), family.batch())
    assert abs(mine[0] - theirs[0]) < 1e-6 * theirs[0]
    largest = max(grad.abs().max() for grad in theirs[1].values())
    assert mine[1].keys() == theirs[1].keys()
    for parameter, grad in theirs[1].items():
        assert (mine[1][parameter] - grad).abs().max() < 1e-5 * largest, parameter


@pytest.fixture
def seen(monkeypatch):
    """What the language model's attention got in the place of the mask, by type."""
    from vlmtune.models import attention

    kinds = []
    inner = attention._attention

    def note(module, query, key, value, attention_mask, **kwargs):
        kinds.append(type(attention_mask))
        return inner(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(attention, '_attention', note)
    return kinds


@pytest.mark.parametrize('name', ['llama', 'mistral'])
def test_only_packed_rows_get_segments(name, case, seen):
    family = case(name)
    model = family.build().eval()
    with torch.no_grad():
        model(**family.batch())
        assert set(seen) == {Segments}
        seen.clear()
        model(**family.batch(pack=False))
        assert set(seen) == {torch.Tensor}


@pytest.mark.parametrize('name', ['llama', 'mistral', 'qwen2_5_vl', 'llava'])
def test_padded_rows_and_answers_are_those_of_transformers_to_the_bit(name, case):
    family = case(name)
    model = family.build().eval()
    batch = family.batch(pack=False)
    inputs = {k: v for k, v in family.batch(0, pack=False).items() if k not in ('labels', 'position_ids')}
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.no_grad():
        mine = model(**batch), model.model.generate(**inputs, **settings)
        as_transformers(model)
        assert torch.equal(model(**batch), mine[0])
        assert torch.equal(model.model.generate(**inputs, **settings), mine[1])


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('llama', f'llm {OURS}'),
        ('llava', f'llm {OURS}; vision_encoder sdpa'),
        ('qwen2_5_vl', f'llm {OURS}; vision_encoder {TOWER}'),
        ('qwen3_vl_moe', f'llm {OURS}; vision_encoder {TOWER}'),
        ('gemma3', 'llm sdpa; vision_encoder sdpa'),  # its masks are made by ops/masks.py
    ],
)
def test_the_log_says_what_runs_where(name, expected, case, caplog):
    with caplog.at_level('INFO', logger='vlmtune'):
        model = case(name).build()
    assert f'attention: {expected}' in caplog.text
    assert describe_attention(model.model, family=FAMILIES[name]) == expected


def test_eager_means_transformers_own(case, seen):
    family = case('llama')
    model = family.build(attn_implementation='eager')
    with torch.no_grad():
        assert abs(model(**family.batch()) - family.build()(**family.batch())) < 1e-3
    assert set(seen) == {Segments}  # of the second model only
    assert describe_attention(model.model, family=FAMILIES['llama']) == 'llm eager'


def test_the_windows_of_a_tower_are_computed_together(case):
    """Two images of the tiny tower: far fewer calls than windows, and the same features."""
    family = case('qwen2_5_vl')
    model = family.build().eval()
    batch, calls = family.batch(), []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                calls.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    def features():
        calls.clear()
        with torch.no_grad(), Count():
            return model.model.model.visual(batch['pixel_values'], grid_thw=batch['image_grid_thw']).pooler_output

    mine, together = features(), list(calls)
    as_transformers(model)
    theirs, single = features(), list(calls)
    assert sum(together) == sum(single) == len(single) > len(together)
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_saved_model_does_not_name_our_functions(case, tmp_path):
    case('qwen2_5_vl').build().model.save_pretrained(tmp_path)
    assert 'vlmtune' not in (tmp_path / 'config.json').read_text()
