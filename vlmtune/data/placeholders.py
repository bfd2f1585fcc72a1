"""What one image becomes in the token sequence, from its size alone.

Each function takes the processor, the size of an image and the number of images in its sample, and returns runs (a text
and how often it is repeated) that take the place of the family's image token, and the patches that the vision encoder
reads. The counts are the image processors' own arithmetic; tests compare the expansion with transformers' processors.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from transformers.image_processing_utils import select_best_resolution
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from vlmtune.data.images import MAX_PIXELS
from vlmtune.structures import ImageSize
from vlmtune.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

Runs: TypeAlias = list[tuple[str, int]]


class ImageTokens(NamedTuple):
    """One image: its tokens, and what the vision encoder reads for it."""

    runs: Runs
    patches: int  # before any merging


def _image_token(processor: 'Processor') -> str:
    return str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))


def _setting(processor: 'Processor', name: str) -> int | str:
    """A setting of the family's processor class: processor_config.json; in older checkpoints only config.json."""
    found = processor.joint_settings.get(name)
    return getattr(processor.config, name) if found is None else found


def _grid(processor: 'Processor', *, height: int, width: int) -> int:
    """Patches of a picture of ``height`` x ``width`` pixels."""
    patch = processor.joint_settings.get('patch_size') or processor.config.vision_config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return (height // rows) * (width // columns)


def patch_grid(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """Qwen-VL: one token per merged patch; the vision markers around it come from the chat template.

    Raises:
        DataError: the image is more than 200 times as long as wide.
    """
    try:
        patches = processor.image_processor.get_number_of_image_patches(size.height, size.width, {})
    except ValueError as error:
        raise DataError(f'an image of {size.width}x{size.height} pixels cannot be used: {error}') from error
    return ImageTokens([(_image_token(processor), patches // processor.image_processor.merge_size**2)], patches)


def fixed_grid(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """LLaVA-1.5: the same number for every image, whatever its size.

    Raises:
        DataError: the image is to be padded to a square that is too large.
    """
    image_processor, side = processor.image_processor, max(size.height, size.width)
    if getattr(image_processor, 'do_pad', None) and side**2 > MAX_PIXELS:
        raise DataError(
            f'an image of {size.width}x{size.height} pixels would be padded to a square of {side}x{side}; crop it',
            kind='oversized_image',
        )
    target = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    if not target.get('height') or not target.get('width'):
        raise ConfigError(
            f'image_processor: size={dict(target)} does not make images of one size; set height and width'
        )
    patches = _grid(processor, height=target['height'], width=target['width'])
    return ImageTokens([(_image_token(processor), patches + _class_token(processor))], patches)


def _class_token(processor: 'Processor') -> int:
    """1 where the class token is kept among the features of LLaVA's towers, -1 where there is none to be left out."""
    with_class_token = processor.config.vision_config.model_type == 'clip_vision_model'
    extra = processor.joint_settings.get('num_additional_image_tokens', int(with_class_token))
    return int(extra) - (_setting(processor, 'vision_feature_select_strategy') == 'default')


def tiles(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """InternVL: as many tiles as fit the aspect ratio, and a thumbnail."""
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    count = image_processor.get_number_of_image_patches(
        size.height, size.width, {'crop_to_patches': image_processor.crop_to_patches}
    )
    per_tile = int(_setting(processor, 'image_seq_length'))
    runs = [
        (tokenizer.start_image_token, 1),
        (_image_token(processor), per_tile * count),
        (tokenizer.end_image_token, 1),
    ]
    tile = image_processor.size
    return ImageTokens(runs, count * _grid(processor, height=tile['height'], width=tile['width']))


def rows_and_columns(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """Idefics3 and SmolVLM: marked tiles row by row, then the whole image."""
    rows, columns = _rows_and_columns(processor.image_processor, size)
    vision = processor.config.vision_config
    from_config = (vision.image_size // vision.patch_size) ** 2 // processor.config.scale_factor**2
    per_tile = processor.joint_settings.get('image_seq_len') or from_config
    fake, image = '<fake_token_around_image>', _image_token(processor)
    runs: Runs = []
    for row in range(rows):
        for column in range(columns):
            runs += [(f'{fake}<row_{row + 1}_col_{column + 1}>', 1), (image, per_tile)]
        runs.append(('\n' if row + 1 < rows else '\n\n', 1))
    runs += [(f'{fake}<global-img>', 1), (image, per_tile), (fake, 1)]
    side = processor.image_processor.max_image_size['longest_edge']
    return ImageTokens(runs, (rows * columns + 1) * _grid(processor, height=side, width=side))


def _rows_and_columns(image_processor: Any, size: ImageSize) -> tuple[int, int]:
    """Tiles of an image, (0, 0) where it stays whole; the steps of the image processor's ``_preprocess``.

    Its own ``get_number_of_image_patches`` rounds the shorter side before the longer one has become whole tiles, and so
    counts too few where ``longest_edge`` is no multiple of a tile.
    """
    if not image_processor.do_image_splitting:
        return 0, 0
    height, width = size
    if image_processor.do_resize:
        nothing = np.broadcast_to(np.uint8(0), (3, height, width))  # asked for its shape, takes no memory
        height, width = get_resize_output_image_size(nothing, image_processor.size['longest_edge'])
    side, ratio = image_processor.max_image_size['longest_edge'], width / height
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / ratio) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * ratio) / side)
    return (rows, columns) if max(rows, columns) > 1 else (0, 0)


class _AnyRes(NamedTuple):
    """The tiles that cover an image, and the patches of them that are left when the padding is cut off."""

    tiles: int  # without the whole image
    rows: int  # patches
    columns: int


def _any_resolution(processor: 'Processor', size: ImageSize, *, tile: int, side: int) -> _AnyRes:
    """LLaVA-NeXT's "anyres" (https://llava-vl.github.io/blog/2024-01-30-llava-next/): an image keeps its aspect ratio.

    Args:
        tile: pixels along the edge of a tile.
        side: patches along the edge of a tile.

    Raises:
        ConfigError: the image processor knows other resolutions than the model, which counts by its own.
    """
    pinpoints = [list(point) for point in processor.image_processor.image_grid_pinpoints]
    if pinpoints != [list(point) for point in processor.config.image_grid_pinpoints]:
        raise ConfigError(
            f'image_processor: image_grid_pinpoints={pinpoints} differ from those of the model, '
            f'{processor.config.image_grid_pinpoints}; leave them as they are'
        )
    best_height, best_width = select_best_resolution(tuple(size), pinpoints)
    tile_rows, tile_columns = best_height // tile, best_width // tile
    rows, columns = side * tile_rows, side * tile_columns
    if size.width / size.height > columns / rows:
        rows -= (rows - int(round(size.height * (columns / size.width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(size.width * (rows / size.height), 7))) // 2 * 2
    return _AnyRes(tile_rows * tile_columns, rows, columns)


def tiles_and_newlines(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """LLaVA-NeXT: the whole image, then its tiles without padding, a newline after every row of patches."""
    target = processor.image_processor.size
    tile = target.get('shortest_edge') or min(target['height'], target['width'])
    per_tile = _grid(processor, height=tile, width=tile)
    found = _any_resolution(processor, size, tile=tile, side=math.isqrt(per_tile))
    count = per_tile + found.rows * (found.columns + 1) + _class_token(processor)
    return ImageTokens([(_image_token(processor), count)], (found.tiles + 1) * per_tile)


def tiles_of_one_image(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """LLaVA-OneVision: as LLaVA-NeXT, in at most so many patches; one tile where a sample has several images."""
    target = processor.image_processor.size
    tile = min(target['height'], target['width'])
    per_tile = _grid(processor, height=tile, width=tile)
    whole = processor.joint_settings.get('num_image_tokens') or per_tile
    left_out = _setting(processor, 'vision_feature_select_strategy') == 'default'
    if images != 1:
        return ImageTokens([(_image_token(processor), whole + 1 - left_out)], per_tile)
    side = math.isqrt(whole)
    found = _any_resolution(processor, size, tile=tile, side=side)
    rows, columns = found.rows, found.columns
    most = int(str(_setting(processor, 'vision_aspect_ratio')).removeprefix('anyres_max_'))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return ImageTokens(
        [(_image_token(processor), whole + rows * (columns + 1) - left_out)], (found.tiles + 1) * per_tile
    )


def fixed_length(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """Gemma 3 and PaliGemma: the same number for every image; what stands around them comes from the template.

    Raises:
        ConfigError: Gemma 3 is told to add crops of an image (pan and scan).
    """
    if getattr(processor.image_processor, 'do_pan_and_scan', False):
        raise ConfigError('image_processor: do_pan_and_scan=True is not supported; set it to False')
    target = processor.image_processor.size
    count = processor.joint_settings.get('image_seq_length') or processor.image_processor.image_seq_length
    patches = _grid(processor, height=target['height'], width=target['width'])
    return ImageTokens([(_image_token(processor), count)], patches)
