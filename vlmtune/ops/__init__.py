"""Tensors in, tensors out."""

from vlmtune.ops.cross_entropy import linear_cross_entropy
from vlmtune.ops.pixels import finish_images, normalize_pixels
from vlmtune.ops.positions import mrope_positions, segment_lengths

__all__ = ['finish_images', 'linear_cross_entropy', 'mrope_positions', 'normalize_pixels', 'segment_lengths']
