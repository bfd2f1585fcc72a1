"""Noise on the input embeddings while training (NEFTune, https://arxiv.org/abs/2310.05914).

Letters: B rows, L tokens, D size of an embedding.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.ops import segment_lengths


def sample_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """long[B, L]: for every token the length of its sample, in packed rows and in padded ones."""
    if (mask := batch.get('attention_mask')) is not None:
        return mask.sum(-1, keepdim=True).expand_as(mask)
    lengths = segment_lengths(batch['position_ids'])
    return torch.repeat_interleave(lengths, lengths).view_as(batch['input_ids'])


class EmbeddingNoise:
    """Adds uniform noise in [-1, 1) * alpha / sqrt(L * D), L being the length of the token's own sample.

    It is drawn from the global generator, which checkpoints keep. Image features replace their tokens' embeddings and
    stay as they are.

    Args:
        embeddings: the input embeddings; they get a forward hook.
        alpha: the paper takes 5 to 15.
    """

    def __init__(self, embeddings: nn.Module, *, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None
        embeddings.register_forward_hook(self._add)

    @contextmanager
    def during(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Noise for the forward pass of a training batch; outside of it there is none."""
        self._lengths = sample_lengths(batch)
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self._lengths is None or not module.training:
            return output
        bound = self.alpha / torch.sqrt(self._lengths * math.prod(output.shape[2:])).unsqueeze(-1)
        return output + (torch.rand_like(output) * 2 - 1) * bound.to(output.dtype)
