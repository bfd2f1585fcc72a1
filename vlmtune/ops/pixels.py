"""Bytes of pixels -> what a vision encoder reads.

Letters: N images or tiles, P patches, C = 3 channels, D pixels of a patch.
"""

from torch import Tensor


def normalize_pixels(pixel_bytes: Tensor, *, affine: Tensor, frames: int = 1) -> Tensor:
    """``byte * scale + shift`` in float32, and patches laid out as the encoder takes them.

    Bytes are a quarter of the floats, an eighth of those that an encoder of videos gets, so they are what data loading
    carries; this runs on the device of the model.

    Args:
        pixel_bytes: uint8[N, C, H, W], or uint8[P, C, D].
        affine: float32[2, C]: scale and shift.
        frames: a patch stands for as many equal frames.

    Returns:
        float32[N, C, H, W], or float32[P, C * frames * D].
    """
    scale, shift = (row.view(-1, *[1] * (pixel_bytes.ndim - 2)) for row in affine)
    pixels = pixel_bytes.float().mul_(scale).add_(shift)
    if pixels.ndim == 4:
        return pixels
    patches, channels, size = pixels.shape
    out = pixels.new_empty(patches, channels, frames, size)
    return out.copy_(pixels.unsqueeze(2)).view(patches, -1)


def finish_images(inputs: dict[str, Tensor], *, frames: int = 1) -> dict[str, Tensor]:
    """Image inputs with ``pixel_values`` in place of ``pixel_bytes`` and ``pixel_affine``, where they hold these."""
    if 'pixel_bytes' not in inputs:
        return inputs
    rest = {name: tensor for name, tensor in inputs.items() if name not in ('pixel_bytes', 'pixel_affine')}
    pixels = normalize_pixels(inputs['pixel_bytes'], affine=inputs['pixel_affine'], frames=frames)
    return {'pixel_values': pixels, **rest}
