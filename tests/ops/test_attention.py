"""Attention by segments is dense attention with a block-diagonal causal mask, forward and backward.

Tolerance 1e-5 on values of about 1: float32 sums in another order.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

from vlmtune.ops.attention import Segments, read_segments, segment_attention

LENGTHS = (5, 3, 5, 5, 1, 12, 3)


def leaves(*, rows=1, heads=4, kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    length = sum(LENGTHS) // rows
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size), (rows, kv_heads, length, size)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def dense(query, key, value, *, mask, scale=None):
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True).transpose(1, 2)


def block_diagonal(window=None):
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    mask = (owner[:, None] == owner).tril()
    return mask if window is None else mask.triu(1 - window)


@pytest.mark.parametrize('window', [None, 1, 2, 4, 5, 11, 12, 40])
@pytest.mark.parametrize(('kv_heads', 'scale'), [(4, None), (2, 0.5), (1, None)])
def test_equals_dense_attention_forward_and_backward(window, kv_heads, scale):
    mine, theirs = leaves(kv_heads=kv_heads), leaves(kv_heads=kv_heads)
    out = segment_attention(*mine, segments=Segments(LENGTHS, window), scale=scale)
    expected = dense(*theirs, mask=block_diagonal(window), scale=scale)
    assert out.is_contiguous()
    assert (out - expected).abs().max() < 1e-5
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for result in (out, expected):
        (result * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5


def test_rows_are_read_one_after_another():
    mine = leaves(rows=2)
    lengths = (5, 3, 9, 4, 12, 1)
    out = segment_attention(*mine, segments=Segments(lengths))
    for row, own in enumerate((lengths[:3], lengths[3:])):
        alone = segment_attention(*(t[row : row + 1] for t in mine), segments=Segments(own))
        assert (out[row] - alone[0]).abs().max() < 1e-5
    mask = Segments(lengths, 3).dense(rows=2, device=torch.device('cpu'))
    assert mask.shape == (2, 1, 17, 17)
    assert torch.equal(mask[1, 0, :4, :4], torch.ones(4, 4, dtype=torch.bool).tril().triu(-2))


def test_without_causality_a_segment_sees_all_of_itself():
    mine = leaves()
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    out = segment_attention(*mine, segments=Segments(LENGTHS), causal=False)
    assert (out - dense(*mine, mask=owner[:, None] == owner)).abs().max() < 1e-5


def test_segments_of_one_length_are_computed_together():
    calls = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product_attention:
                calls.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Count():
        segment_attention(*leaves(), segments=Segments(LENGTHS))
    assert calls == [(3, 4, 5, 8), (2, 4, 3, 8), (1, 4, 1, 8), (1, 4, 12, 8)]


def test_borders():
    borders = Segments((2, 3, 1)).borders(torch.device('cpu'))
    assert borders.dtype == torch.int32
    assert borders.tolist() == [0, 2, 5, 6]


# ---- reading transformers' mask functions


def packed(inner):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))[None]
    return packed_sequence_compatibility_function(inner, positions, owner)


def read(function, *, window=None, length=34):
    return read_segments(function, rows=1, length=length, window=window, device='cpu')


def test_a_packed_row_is_recognised():
    assert read(packed(causal_mask_function)) == Segments(LENGTHS)
    assert read(packed(sliding_window_causal_mask_function(4)), window=4) == Segments(LENGTHS, 4)
    assert read(sliding_window_causal_mask_function(4), window=4, length=9) == Segments((9,), 4)


def test_what_is_not_a_causal_mask_of_segments_is_not_recognised():
    blocks = torch.full((1, sum(LENGTHS)), -1)
    blocks[0, 20:23] = 0
    image = blockwise_overlay(blocks)
    assert read(or_masks(packed(causal_mask_function), image)) is None
    assert read(packed(sliding_window_causal_mask_function(4))) is None  # a window that was not told
    assert read(packed(sliding_window_causal_mask_function(4)), window=6) is None


def test_chunks_are_segments():
    chunks = chunked_causal_mask_function(10, torch.zeros(1, dtype=torch.long))
    assert read(chunks, window=10) == Segments((10, 10, 10, 4), 10)
