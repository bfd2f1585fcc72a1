"""Tensors in, tensors out."""

from vlmtune.ops.cross_entropy import linear_cross_entropy
from vlmtune.ops.positions import mrope_positions, segment_lengths

__all__ = ['linear_cross_entropy', 'mrope_positions', 'segment_lengths']
