"""PIL images -> the bytes of which the image processor makes its tensors, without its detours.

An image processor of transformers turns an image into an array and back to resize it, goes through float64, and copies
at every step. These functions resize with the same call of Pillow, so the bytes are the same ones, and gather them in
the order of the result; ``ops.pixels.normalize_pixels`` makes floats of them, where the model is. A family names its
function in ``families.py``.

Letters: I images, N tiles or crops, P patches, C = 3 channels.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmtune.families import Family
from vlmtune.ops import finish_images

logger = logging.getLogger(__name__)

PixelFunction: TypeAlias = Callable[[Any, Sequence[Image.Image]], dict[str, Tensor]]

TOLERANCE = 1e-5  # the processors round to float32 more often; they differ from the exact value by up to 1e-6
_PROBES = ((61, 90), (100, 47))  # pixels (height, width): sides of no factor in common, wide and tall
_SIZES = {  # the forms of ``size`` that each function knows
    'merged_patches': ({'shortest_edge', 'longest_edge'},),
    'one_crop': ({'shortest_edge'}, {'height', 'width'}),
    'tiles_and_thumbnail': ({'height', 'width'},),
    'sliced_patches': (set(),),
}

_SQUARES = ('one_crop',)  # those that know do_pad, to a square


def find_pixel_function(family: Family, image_processor: Any) -> PixelFunction | None:
    """The function that makes the family's image inputs; None where only the image processor itself can.

    The function is used only if the settings are those it knows and it makes of two small images what the image
    processor makes of them. Where not, the log says so.
    """
    if family.pixels is None:
        return None
    module, _, name = family.pixels.rpartition('.')
    function: PixelFunction = getattr(importlib.import_module(module), name)
    reason = _unknown_setting(image_processor, function=name) or _difference(function, image_processor)
    if reason is None:
        return function
    logger.info('images are made by %s (slower): %s', type(image_processor).__name__, reason)
    return None


def _unknown_setting(image_processor: Any, *, function: str) -> str | None:
    for name in ('do_resize', 'do_rescale', 'do_normalize'):
        if not getattr(image_processor, name, None):
            return f'{name} is off'
    squares = function in _SQUARES and not getattr(image_processor, 'pad_size', None)
    if getattr(image_processor, 'do_pad', None) and not squares:
        return 'do_pad is on'
    if image_processor.resample not in tuple(Image.Resampling):
        return f'resample={image_processor.resample} is not a filter of Pillow'
    size = {name: value for name, value in dict(image_processor.size or {}).items() if value}
    if set(size) not in _SIZES[function]:
        return f'size={size}'
    if set(size) == {'shortest_edge'} and not getattr(image_processor, 'do_center_crop', None):
        return f'size={size} without a crop makes images of several sizes'
    return None


def _difference(function: PixelFunction, image_processor: Any) -> str | None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in _PROBES]
    theirs = image_processor(images, return_tensors='pt')
    for name, mine in finish_pixels(image_processor, function(image_processor, images)).items():
        if mine.shape != theirs[name].shape:
            return f'{name} would be {tuple(mine.shape)}, not {tuple(theirs[name].shape)}'
        if (error := float((mine - theirs[name]).abs().max())) > TOLERANCE:
            return f'{name} would differ by {error:.1g}'
    return None


# ---- the families' functions


def merged_patches(image_processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Qwen-VL: each image as patches, those that will be merged side by side.

    Returns:
        pixel_bytes uint8[P, C, patch ** 2], image_grid_thw long[I, 3].
    """
    patch, merge = image_processor.patch_size, image_processor.merge_size
    unit = patch * merge
    low, high = image_processor.size['shortest_edge'], image_processor.size['longest_edge']
    sizes = [smart_resize(i.height, i.width, unit, min_pixels=low, max_pixels=high) for i in images]
    grids = torch.tensor([[1, height // patch, width // patch] for height, width in sizes])
    patches = []
    for image, (height, width) in zip(images, sizes, strict=True):
        blocks = _resize(image, height, width, image_processor).reshape(
            height // unit, merge, patch, width // unit, merge, patch, 3
        )
        patches.append(_gather(blocks, (0, 3, 1, 4, 6, 2, 5)).view(-1, 3, patch**2))
    return dict(pixel_bytes=_join(patches), image_grid_thw=grids)


def one_crop(image_processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """LLaVA: each image scaled to a fixed size, or by its shortest edge and cropped in the middle.

    With ``do_pad``, it is made a square before, in the mean colour: ``expand2square`` of haotian-liu/LLaVA
    (llava/mm_utils.py, commit c121f043).

    Returns:
        pixel_bytes uint8[I, C, H, W].
    """
    size, crop = image_processor.size, getattr(image_processor, 'do_center_crop', None)
    target = image_processor.crop_size if crop else size
    height, width = target['height'], target['width']
    crops = []
    for image in images:
        if getattr(image_processor, 'do_pad', None):
            image = _square(image, colour=tuple(int(mean * 255) for mean in image_processor.image_mean))
        scaled = (size.get('height'), size.get('width'))
        if edge := size.get('shortest_edge'):
            scaled = (int(edge * image.height / min(image.size)), int(edge * image.width / min(image.size)))
        pixels = _resize(image, *scaled, image_processor, crop=(height, width))
        crops.append(_gather(pixels, (2, 0, 1))[None])
    return dict(pixel_bytes=_join(crops))


def tiles_and_thumbnail(image_processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """InternVL: each image as the grid of tiles that fits its shape best, then the whole image as one more tile.

    Returns:
        pixel_bytes uint8[N, C, H, W].
    """
    height, width = image_processor.size['height'], image_processor.size['width']
    low, high = image_processor.min_patches, image_processor.max_patches
    tiled = image_processor.crop_to_patches and high > 1
    tiles: list[Tensor] = []  # uint8[n, C, H, W]
    for image in images:
        size = (image.height, image.width)
        columns, rows = get_optimal_tiled_canvas(size, (height, width), low, high) if tiled else (1, 1)
        canvas = _resize(image, height * rows, width * columns, image_processor)
        grid = canvas.reshape(rows, height, columns, width, 3)
        tiles.append(_gather(grid, (0, 2, 4, 1, 3)).flatten(0, 1))
        if rows * columns > 1:
            tiles.append(_gather(_resize(image, height, width, image_processor), (2, 0, 1))[None])
    return dict(pixel_bytes=_join(tiles))


# ---- steps


def _square(image: Image.Image, *, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side; of an odd rest, the smaller half is on top or left."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new('RGB', (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize(
    image: Image.Image, height: int, width: int, image_processor: Any, *, crop: tuple[int, int] | None = None
) -> np.ndarray:
    """The pixels uint8[H, W, C] after Pillow's resize; cut to (height, width) in the middle, black where it ends."""
    top, left = (0, 0) if crop is None else ((height - crop[0]) // 2, (width - crop[1]) // 2)
    if crop is not None and left > 0:  # Pillow resizes rows first, then columns: those that fall away can be spared
        image = image.resize((width, image.height), resample=image_processor.resample)
        image, left, width = image.crop((left, 0, left + crop[1], image.height)), 0, crop[1]
    image = image.resize((width, height), resample=image_processor.resample)
    if crop is not None and crop != (height, width):
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    return np.asarray(image)


def _gather(pixels: np.ndarray, order: tuple[int, ...]) -> Tensor:
    """Bytes in a new order of axes."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(order)))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def finish_pixels(image_processor: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image inputs with floats in place of bytes."""
    frames = getattr(image_processor, 'temporal_patch_size', 1)
    return finish_images({**inputs, 'pixel_affine': pixel_affine(image_processor)}, frames=frames)


def pixel_affine(image_processor: Any) -> Tensor:
    """float32[2, C]: ``(byte * rescale_factor - mean) / std`` as one multiplication and one addition."""
    mean, std = (np.broadcast_to(np.float64(v), 3) for v in (image_processor.image_mean, image_processor.image_std))
    return torch.from_numpy(np.stack([image_processor.rescale_factor / std, -mean / std])).float()
