"""MiniCPM-V 2.0's projector: learned queries that look at the patches of a view of any shape.

The one layer of cross attention is that of Qwen-VL (https://arxiv.org/abs/2308.12966); here a patch brings the position
that it has in its own grid.

Letters: N views, M the most patches of a view, K features of a patch, Q queries, H hidden size.
"""

import torch
from torch import Tensor, nn

HEAD_DIM = 128


class CrossAttention(nn.Module):
    """Attention of queries to keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.heads = size // HEAD_DIM
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """float[N, Q, H] of float[N, Q, H], float[N, M, H] twice, and bool[N, M], False where nothing is to be seen."""
        projected = zip((self.q_proj, self.k_proj, self.v_proj), (queries, keys, values), strict=True)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project, x in projected)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """As many features for every view as there are queries.

    Args:
        queries: how many, a square number.
        features: of a patch.
        size: of what comes out.
    """

    def __init__(self, *, queries: int, features: int, size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, size))
        self.pos_embed = nn.Parameter(torch.zeros(queries, size))  # starts as ``grid_positions``
        self.kv_proj = nn.Identity() if features == size else nn.Linear(features, size, bias=False)
        self.attn = CrossAttention(size)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(size, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(size, size))

    def forward(self, patches: Tensor, grids: list[tuple[int, int]], mask: Tensor | None = None) -> Tensor:
        """Features of views.

        Args:
            patches: float[N, M, K].
            grids: rows and columns of patches, of every view.
            mask: bool[N, M], False behind the last patch of a view; None: all have M.

        Returns:
            float[N, Q, H].
        """
        values = self.ln_kv(self.kv_proj(patches))
        known = {grid: grid_positions(*grid, size=values.shape[-1], like=values) for grid in dict.fromkeys(grids)}
        positions = nn.utils.rnn.pad_sequence([known[grid] for grid in grids], batch_first=True)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        return self.ln_post(self.attn(queries, values + positions, values, mask)) @ self.proj


def grid_positions(rows: int, columns: int, *, size: int, like: Tensor) -> Tensor:
    """float[rows * columns, size] in the dtype of ``like``: sines and cosines of the column, then of the row."""
    steps = torch.arange(size // 4, dtype=torch.float32, device=like.device) / (size / 4)
    frequencies = 1.0 / 10000**steps

    def along(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float32, device=like.device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = along(columns).expand(rows, -1, -1)
    down = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1).to(like.dtype)
