"""Model FLOPs against torch's own counter, and the rules that the counter does not know."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmtune.engine.dimensions import Stack, experts_share, text_stack, vision_stack
from vlmtune.engine.flops import ModelFlops, gradient_parts, peak_tflops
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX

LENGTH = 48
PIXELS = {  # what the image processors of the tiny models make of one image
    'llava': dict(pixel_values=(1, 3, 42, 42)),
    'internvl': dict(pixel_values=(2, 3, 56, 56)),
    'smolvlm': dict(pixel_values=(1, 2, 3, 56, 56)),
    'qwen2_vl': dict(pixel_values=(32, 1176), grid=(1, 4, 8)),
    'qwen2_5_vl': dict(pixel_values=(64, 1176), grid=(1, 8, 8)),
    'qwen3_vl': dict(pixel_values=(32, 1536), grid=(1, 4, 8)),
}
IMAGE_TOKENS = dict(llava=9, internvl=8, smolvlm=8, qwen2_vl=8, qwen2_5_vl=16, qwen3_vl=8)
VISION_FULL = dict(vision_encoder='full', projector='full', llm='full')


def build(tiny_model, name, tune, **kwargs):
    path = str(tiny_model(name))
    return SupervisedFinetune(path, tune=tune, dtype='float32', attn_implementation='eager', **kwargs)


def batch_of(model, name, *, length=LENGTH, learned=0.5):
    config = model.model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 60, (1, length), generator=generator)
    batch = dict(input_ids=ids, position_ids=torch.arange(length)[None])
    if name in PIXELS:
        ids[0, 1 : 1 + IMAGE_TOKENS[name]] = config.image_token_id
        batch['pixel_values'] = torch.randn(PIXELS[name]['pixel_values'], generator=generator)
        if 'grid' in PIXELS[name]:
            batch['image_grid_thw'] = torch.tensor([PIXELS[name]['grid']])
            batch['position_ids'] = batch['position_ids'].expand(4, 1, length).contiguous()
    labels = ids.clone()
    labels[:, : int(length * (1 - learned))] = IGNORE_INDEX
    return dict(batch, labels=labels)


def counted(model, batch, *, backward):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model.model(**{k: v for k, v in batch.items() if k != 'labels'}).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def as_counted(model, batch, *, backward):
    """As the counter sees it: whole squares where attention is causal, and the head on every position."""
    flops = ModelFlops(model)
    flows = gradient_parts(model)
    rows = flops.rows(batch)._replace(supervised=LENGTH)
    if not backward:
        for part in flops.parts.values():
            part.frozen, part.trained, part.flows = part.frozen + part.trained, 0, False
        flows = set()
    causal = flops._attention(flops.text, rows.samples, causal=True, flows='llm' in flows)
    return flops.of_rows(rows).total + causal


@pytest.mark.parametrize('name', sorted(PIXELS))
def test_a_forward_pass_as_torch_counts_it(name, tiny_model):
    """Equal; 1 % where there is a class token, which ours sends through the patch embedding, too."""
    model = build(tiny_model, name, dict(llm='lora'))
    batch = batch_of(model, name)
    assert as_counted(model, batch, backward=False) == pytest.approx(counted(model, batch, backward=False), rel=0.01)


@pytest.mark.parametrize('name', ['qwen2', 'llava', 'internvl', 'qwen3_vl'])
def test_forward_and_backward_of_all_parts_as_torch_counts_them(name, tiny_model):
    """As above, but for the gradient of the pixels, which nobody takes and 6N counts: much in a tiny model."""
    model = build(tiny_model, name, VISION_FULL if name in PIXELS else dict(llm='full'))
    batch = batch_of(model, name)
    pixels = batch.get('pixel_values', torch.empty(0)).numel() * 2 * 32  # 32 is the width of the tiny encoders
    expected = counted(model, batch, backward=True) + pixels
    assert as_counted(model, batch, backward=True) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('name', ['llava', 'qwen3_vl'])
def test_lora_behind_a_frozen_encoder_as_torch_counts_it(name, tiny_model):
    """A forward pass alone for the encoder, 4N and 6N for the rest."""
    model = build(tiny_model, name, dict(projector='full', llm='lora'))
    batch = batch_of(model, name)
    assert as_counted(model, batch, backward=True) == pytest.approx(counted(model, batch, backward=True), rel=0.01)


def per_row(model):
    return {name: part.per_row for name, part in ModelFlops(model).parts.items()}


def test_what_gradients_never_reach_costs_its_forward_pass_alone(tiny_model):
    frozen = per_row(build(tiny_model, 'smolvlm', dict(projector='full')))
    trained = per_row(build(tiny_model, 'smolvlm', VISION_FULL))
    assert frozen['vision_encoder'] * 3 == trained['vision_encoder']
    assert frozen['projector'] == trained['projector'] == 6 * 128 * 64
    assert frozen['llm'] * 6 == trained['llm'] * 4  # gradients flow through it to the projector
    assert frozen['lm_head'] * 6 == trained['lm_head'] * 4
    assert (
        per_row(build(tiny_model, 'qwen2', dict(lm_head='full')))['llm'] * 3
        == per_row(build(tiny_model, 'qwen2', dict(llm='full')))['llm']
    )


def test_lora_is_frozen_weights_and_small_trained_ones(tiny_model):
    part = ModelFlops(build(tiny_model, 'qwen2', dict(llm='lora'), lora=dict(r=4))).parts['llm']
    whole = ModelFlops(build(tiny_model, 'qwen2', dict(llm='full'))).parts['llm']
    assert part.frozen == whole.trained
    inputs_and_outputs = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3
    assert part.trained == 2 * 4 * inputs_and_outputs


def test_samples_of_a_pack_look_at_themselves_only(tiny_model):
    model = build(tiny_model, 'qwen2', dict(llm='full'))
    one = batch_of(model, 'qwen2')
    two = {**one, 'position_ids': torch.cat([torch.arange(LENGTH // 2)] * 2)[None]}
    flops = ModelFlops(model)
    assert flops.of(two).attention * 2 == flops.of(one).attention
    assert flops.of(two).llm == flops.of(one).llm
    assert flops.of(one).attention == 3 * 4 * 64 * LENGTH**2 / 2 * 2  # width 64, two layers


def test_padding_and_what_is_not_learned_do_not_count(tiny_model):
    model = build(tiny_model, 'qwen2', dict(llm='full'))
    flops, batch = ModelFlops(model), batch_of(model, 'qwen2', learned=0.25)
    assert flops.rows(batch)[:3] == (LENGTH, LENGTH // 4, 0)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, LENGTH // 2 :] = 0
    assert flops.rows({**batch, 'attention_mask': mask}).tokens == LENGTH // 2


def test_of_a_mixture_only_the_visited_experts(tiny_model):
    model = build(tiny_model, 'qwen3_vl_moe', dict(projector='full'))
    config = model.model.config
    assert experts_share(config) == 0.5
    assert text_stack(config).mlp == 2 * 32
    attention = 64 * 64 * 2 + 64 * 32 * 2
    visited = 2 * 3 * 64 * 32 + 64 * 4  # two experts and the router
    assert ModelFlops(model).parts['llm'].frozen == 3 * (attention + visited)


def test_quantised_layers_count_what_they_stand_for(tiny_model):
    quantised = build(tiny_model, 'qwen2', dict(llm='lora'), quantization='nf4')
    assert per_row(quantised) == per_row(build(tiny_model, 'qwen2', dict(llm='lora')))


def test_windows():
    lengths = torch.tensor([10, 100])
    flops = ModelFlops._attention(Stack(8, 8, 8, 8, (None, 20)), lengths, causal=True, flows=False)
    within = 10**2 / 2 + (20**2 / 2 + 80 * 20)  # the first 20 tokens see fewer
    assert flops == 4 * 8 * ((10**2 + 100**2) / 2 + within)


def test_stacks(tiny_model):
    qwen = build(tiny_model, 'qwen2_5_vl', dict(llm='lora')).model.config
    assert text_stack(qwen) == Stack(hidden=64, queries=64, keys=32, mlp=128, windows=(None, None))
    assert vision_stack(qwen) == Stack(hidden=32, queries=32, keys=32, mlp=64, windows=(16, None))
    older = build(tiny_model, 'qwen2_vl', dict(llm='lora')).model.config
    assert vision_stack(older).hidden == 32  # not the language model's 64
    assert vision_stack(build(tiny_model, 'qwen2', dict(llm='lora')).model.config) is None


@pytest.mark.parametrize(
    ('name', 'peak'),
    [
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H200', 989),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA L40S', 362),
        ('NVIDIA GeForce RTX 4090', 165),
        ('NVIDIA B200', 2250),
        ('Tesla V100-SXM2-32GB', 125),
        ('NVIDIA A1000', None),
        ('cpu', None),
    ],
)
def test_device_peaks(name, peak):
    assert peak_tflops(name) == peak
