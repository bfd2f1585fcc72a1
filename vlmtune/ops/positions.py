"""Rotary positions of multimodal sequences, one sample at a time, from token ids and image grids alone.

Letters: B rows, L tokens, I images, S samples.
"""

import torch
from torch import Tensor


def mrope_positions(input_ids: Tensor, *, image_token_id: int, image_grid_thw: Tensor, merge_size: int) -> Tensor:
    """Three-axis positions of the Qwen-VL families (M-RoPE, https://arxiv.org/abs/2409.12191, section 2.1).

    Text advances all three axes together. An image spans (t, h, w) after merging: its tokens take the start plus
    their time, row and column, and the text after it goes on from the largest position used.

    Args:
        input_ids: long[L], one sample, placeholders expanded.
        image_token_id: the id whose runs are images.
        image_grid_thw: long[I, 3], patches before merging.
        merge_size: patches merged along each side.

    Returns:
        long[3, L]: time, height, width.

    Raises:
        ValueError: the image tokens do not add up to the grids.
    """
    is_image = input_ids == image_token_id
    grids = [(int(t), int(h) // merge_size, int(w) // merge_size) for t, h, w in image_grid_thw]
    expected = sum(t * h * w for t, h, w in grids)
    if int(is_image.sum()) != expected:
        raise ValueError(f'{int(is_image.sum())} image tokens but {len(grids)} grids that make {expected}')
    pieces, at, start = [], 0, 0
    image_at = is_image.nonzero().flatten().tolist()
    used = 0
    for t, h, w in grids:
        first = image_at[used]
        used += t * h * w
        pieces.append((torch.arange(first - at) + start).expand(3, -1))
        start += first - at
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing='ij')
        pieces.append(torch.stack([axis.flatten() for axis in axes]) + start)
        start += max(t, h, w)
        at = first + t * h * w
    pieces.append((torch.arange(len(input_ids) - at) + start).expand(3, -1))
    return torch.cat(pieces, dim=1)


def segment_lengths(position_ids: Tensor) -> Tensor:
    """Lengths of the samples of packed rows, read from where positions do not go on by one.

    Args:
        position_ids: long[B, L], or long[4, B, L] whose first axis counts tokens.

    Returns:
        long[S]; rows one after another, so the sum is B * L.
    """
    rows = position_ids[0] if position_ids.ndim == 3 else position_ids
    first = torch.ones_like(rows, dtype=torch.bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    starts = first.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([rows.numel()]))
