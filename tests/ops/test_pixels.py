"""Bytes become the floats that the formula says, in the layout that encoders of images and of videos take."""

import torch

from vlmtune.ops import finish_images, normalize_pixels

AFFINE = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.0, 1.0]])


def test_images_keep_their_shape():
    pixels = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    found = normalize_pixels(pixels, affine=AFFINE)
    assert found.dtype == torch.float32
    for channel, (scale, shift) in enumerate(AFFINE.T.tolist()):
        assert torch.equal(found[:, channel], pixels[:, channel].float() * scale + shift)


def test_patches_stand_for_equal_frames_within_each_channel():
    pixels = torch.randint(0, 256, (4, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalize_pixels(pixels, affine=AFFINE, frames=2).view(4, 3, 2, 5)
    assert torch.equal(found[:, :, 0], found[:, :, 1])
    assert torch.equal(found[:, :, 0], pixels * AFFINE[0][:, None] + AFFINE[1][:, None])


def test_inputs_without_bytes_stay_as_they_are():
    inputs = {'input_ids': torch.ones(1, 2)}
    assert finish_images(inputs) is inputs
    bytes_ = {**inputs, 'pixel_bytes': torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 'pixel_affine': AFFINE}
    assert set(finish_images(bytes_)) == {'input_ids', 'pixel_values'}
