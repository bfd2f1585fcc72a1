"""Attention among the tokens of one sample, many samples in one row, without a mask of L x L.

Letters: B rows, L tokens, S samples (segments), H heads, K key-value heads, D head size.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MaskFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Segments:
    """Where samples begin and end in rows that are read one after another.

    Attributes:
        lengths: tokens of every segment; they add up to B * L.
        window: a token sees itself and ``window - 1`` tokens before it; None: all before it.
    """

    lengths: tuple[int, ...]
    window: int | None = None

    def borders(self, device: torch.device) -> Tensor:
        """int32[S + 1]: 0, then where every segment ends; the form that variable-length kernels take."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)

    def dense(self, *, rows: int, device: torch.device) -> Tensor:
        """bool[B, 1, L, L]: the mask that says the same, True where a token is seen."""
        count = sum(self.lengths) // rows
        owner = torch.repeat_interleave(torch.tensor(self.lengths)).to(device).view(rows, 1, count)
        mask = (owner.unsqueeze(-1) == owner.unsqueeze(-2)).tril()
        return mask if self.window is None else mask.triu(1 - self.window)


def read_segments(
    mask_function: MaskFunction, *, rows: int, length: int, window: int | None, device: torch.device | str
) -> Segments | None:
    """The segments of a causal mask that is given as a function of (row, head, query, key), in O(L).

    Neighbours that do not see each other are a border. That the mask is what its borders and ``window`` say is probed:
    nobody sees ahead; in each segment the last token that should still see the first one does, and the next does not.

    Args:
        mask_function: takes broadcastable long tensors, gives bool.
        rows: B.
        length: L, at least 2.
        window: see ``Segments``.
        device: where ``mask_function`` computes.

    Returns:
        None if the mask is something else.
    """
    row = torch.arange(rows, device=device)[:, None]
    token = torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)

    def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(row, head, query, key).expand(torch.broadcast_shapes(row.shape, query.shape, key.shape))

    if sees(row, token[:, :-1], token[:, 1:]).any():
        return None
    first = torch.ones(rows, length, dtype=torch.bool, device=device)
    first[:, 1:] = ~sees(row, token[:, 1:], token[:, :-1])
    where, starts = first.nonzero(as_tuple=True)
    flat = (where * length + starts).tolist()
    lengths = tuple(end - start for start, end in zip(flat, [*flat[1:], rows * length], strict=True))
    sizes = torch.tensor(lengths, device=device)
    reach = sizes if window is None else sizes.clamp(max=window)
    outside = reach < sizes
    beyond = sees(where, starts + torch.where(outside, reach, 0), starts) & outside
    if not sees(where, starts + reach - 1, starts).all() or beyond.any():
        return None
    return Segments(lengths, window)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Scaled dot product attention inside every segment.

    Segments of one length are computed together, neighbours among them without a copy.

    Args:
        query: float[B, H, L, D].
        key, value: float[B, K, L, D]; H is a multiple of K.
        segments: of the B rows.
        scale: of the scores; None: 1 / sqrt(D).
        dropout: probability.
        causal: whether a token sees only tokens before it; without, ``segments.window`` is ignored.

    Returns:
        float[B, L, H, D], contiguous.
    """
    rows, length = query.shape[0], query.shape[2]
    options: dict[str, Any] = dict(scale=scale, dropout_p=dropout, enable_gqa=key.shape[1] != query.shape[1])
    window = segments.window if causal else None
    runs = [(size, len(list(group))) for size, group in groupby(segments.lengths)]
    pieces = [_split_runs(tensor, runs) for tensor in (query, key, value)]
    of_length: dict[int, list[int]] = defaultdict(list)
    for i, (size, _) in enumerate(runs):
        of_length[size].append(i)
    outputs: list[Tensor] = [query] * len(runs)
    for size, places in of_length.items():
        q, k, v = (torch.cat([piece[i] for i in places]) if len(places) > 1 else piece[places[0]] for piece in pieces)
        if window is not None and size > window:
            out = _windowed(q, k, v, window=window, **options)
        else:
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
        for i, part in zip(places, out.transpose(1, 2).split([runs[i][1] for i in places]), strict=True):
            outputs[i] = part.flatten(0, 1)
    return torch.cat(outputs).view(rows, length, query.shape[1], value.shape[-1])


def _split_runs(tensor: Tensor, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """float[B, H, L, D] -> for every run of ``count`` segments of one length, float[count, H, length, D]."""
    tokens = tensor.transpose(1, 2).flatten(0, 1)
    pieces = tokens.split([size * count for size, count in runs])
    return [piece.unflatten(0, (-1, size)).transpose(1, 2) for piece, (size, _) in zip(pieces, runs, strict=True)]


def _windowed(query: Tensor, key: Tensor, value: Tensor, *, window: int, enable_gqa: bool, **options: Any) -> Tensor:
    """Causal attention to the last ``window`` tokens, ``window`` queries at a time: no mask of the whole length.

    Args and result: float[N, H or K, length, D].
    """
    if enable_gqa:  # fast kernels with a mask do not share key-value heads
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Query i of a block sees the keys i ... i + window - 1 of those that begin window - 1 before the block.
    band = torch.ones(window, 2 * window - 1, dtype=torch.bool, device=query.device).tril(window - 1).triu()
    head = slice(0, window)
    outputs = [
        scaled_dot_product_attention(query[:, :, head], key[:, :, head], value[:, :, head], is_causal=True, **options)
    ]
    for start in range(window, query.shape[2], window):
        block = query[:, :, start : start + window]
        size = block.shape[2]
        seen = slice(start - window + 1, start + size)
        mask = band[:size, : size + window - 1]
        outputs.append(scaled_dot_product_attention(block, key[:, :, seen], value[:, :, seen], mask, **options))
    return torch.cat(outputs, dim=2)
