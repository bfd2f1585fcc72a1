"""The check at the start of a run: passes where samples are kept apart, stops where they are not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtune.engine.hooks.isolation import change_sample
from vlmtune.models.isolation import check_isolation, check_positions
from vlmtune.utils.errors import ConfigError, TrainingError

NAMES = ['llama', 'mistral', 'qwen3_vl_moe', 'llava', 'qwen2_5_vl', 'internvl', 'smolvlm', 'gemma3', 'paligemma']


def batches(family, spoil=lambda batch: batch):
    """Pack of samples 0 and 1, the same with another sample 0, sample 1 alone."""
    from dataclasses import replace

    other = replace(family, samples=[change_sample(family.samples[0], processor=family.processor), *family.samples[1:]])
    return dict(
        packed=spoil(family.batch(0, 1)),
        changed=spoil(other.batch(0, 1)),
        alone=family.batch(1),
        border=len(family.samples[0]['input_ids']),
    )


def running(batch):
    """Positions that go on from sample to sample: the second one sees the first."""
    positions = batch['position_ids'].clone()
    positions[..., :] = torch.arange(positions.shape[-1])
    return {**batch, 'position_ids': positions}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', NAMES)
def test_isolated_families_pass(name, dtype, case):
    family = case(name, amplify=1.0)
    report = check_isolation(family.build(dtype=dtype, gradient_checkpointing=True), **batches(family))
    assert report.leak <= 4 * 2**-23 if name != 'qwen3_vl_moe' else report.leak <= 4 * 2**-7
    assert report.own > 0.1
    assert report.alone < (1e-4 if dtype == 'float32' else 0.1)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['llama', 'llava', 'qwen2_5_vl', 'internvl'])
def test_a_leak_stops_the_run_also_with_fresh_weights(name, dtype, case):
    """Weights are not amplified: fresh ones hardly feel their neighbours."""
    family = case(name, amplify=1.0)
    with pytest.raises(TrainingError, match=r'packed samples see each other \(llm sdpa.*at most 4.8e-07 is rounding'):
        check_isolation(family.build(dtype=dtype), **batches(family, running))


def test_what_the_neighbour_does_not_change_is_found_by_the_sample_alone(case):
    """Positions that run on shift nothing in a rotary model; other tokens in the second sample do."""
    family = case('llama')
    given = batches(family)
    given['alone'] = family.batch(2)
    short = min(given['alone']['input_ids'].shape[1], given['packed']['input_ids'].shape[1] - given['border'])
    for name in ('input_ids', 'position_ids'):
        given['alone'][name] = given['alone'][name][:, :short]
        for pack in ('packed', 'changed'):
            given[pack][name] = given[pack][name][:, : given['border'] + short]
    with pytest.raises(TrainingError, match='a packed sample is not what it is alone'):
        check_isolation(family.build(), **given)


def test_a_blind_check_is_an_error(case):
    family = case('llama')
    model = family.build()
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(0.1)
    with pytest.raises(TrainingError, match='cannot be told apart'):
        check_isolation(model, **batches(family))


def test_it_leaves_the_model_and_the_generators_alone(case):
    family = case('llava', amplify=1.0)
    model = family.build(tune=dict(llm='lora'), lora=dict(dropout=0.5), neftune_noise_alpha=5.0).train()
    model.model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    check_isolation(model, **batches(family))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_quantised_models_pass(quantization, case):
    family = case('llama', amplify=1.0)
    model = family.build(tune=dict(llm='lora'), quantization=quantization, dtype='bfloat16')
    assert check_isolation(model, **batches(family)).own > 0.1


def test_a_changed_sample_keeps_its_control_tokens_and_images(case):
    family = case('qwen2_5_vl')
    before = next(sample for sample in family.samples if 'pixel_values' in sample)
    after = change_sample(before, processor=family.processor)
    kept = set(family.processor.tokenizer.all_special_ids) | {family.processor.image_token_id}
    for a, b in zip(before['input_ids'].tolist(), after['input_ids'].tolist(), strict=True):
        assert (a == b) == (a in kept or a in family.processor.tokenizer.added_tokens_decoder)
        assert b not in kept or a == b
    assert not torch.equal(before['pixel_values'], after['pixel_values'])
    assert torch.equal(before['image_grid_thw'], after['image_grid_thw'])


LIMIT = 12
DYNAMIC = dict(rope_type='dynamic', factor=2.0, rope_theta=10000.0)
LONG = dict(
    rope_type='longrope', rope_theta=10000.0, original_max_position_embeddings=LIMIT,
    short_factor=[1.0, 1.0, 1.0, 1.0], long_factor=[4.0, 4.0, 4.0, 4.0],
)  # fmt: skip


@pytest.mark.parametrize(('rope', 'most'), [(DYNAMIC, LIMIT), (LONG, 64)])
def test_a_sample_longer_than_the_rope_was_made_for_moves_the_others_of_its_row(rope, most):
    """What the check refuses really leaks, and what it lets through does not."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=most, rope_parameters=rope, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    short, moved = torch.randint(32, (6,)), {}
    with torch.no_grad():
        for longest in (LIMIT, LIMIT + 1):
            ids = torch.cat([short, torch.randint(32, (longest,))])[None]
            positions = torch.cat([torch.arange(6), torch.arange(longest)])[None]
            alone = model(short[None], use_cache=False).logits[0]
            packed = model(ids, position_ids=positions, use_cache=False).logits[0, :6]
            moved[longest] = float((packed - alone).abs().max())
    assert moved[LIMIT] < 1e-4 < moved[LIMIT + 1] / 10  # rounding, and another set of frequencies
    check_positions(config, longest=LIMIT)
    message = (
        rf"longest sample has 13 tokens, and llama with rope_type '{rope['rope_type']}' .* set max_length=12 or less"
    )
    with pytest.raises(ConfigError, match=message):
        check_positions(config, longest=LIMIT + 1)


def test_other_kinds_of_rope_have_no_limit():
    check_positions(LlamaConfig(max_position_embeddings=LIMIT), longest=10**6)
