"""What no setting of an image processor says, told by its name before an image is seen."""

import math
from collections.abc import Mapping
from typing import Any

from vlmtune.data.images import MAX_PIXELS
from vlmtune.utils.errors import ConfigError, ModelError

# Settings that say again what the model is built for: their names in its vision_config.
_MODEL_SIZES = {
    'patch_size': 'patch_size',
    'merge_size': 'spatial_merge_size',
    'temporal_patch_size': 'temporal_patch_size',
}
_LONGEST_EDGE = 8192  # pixels, of what a vision encoder is shown at once
_MOST_PIXELS = 1 << 40  # of a limit, which no image reaches
_COUNTS = {  # most of each; the least is 1
    'patch_size': 1024, 'merge_size': 64, 'temporal_patch_size': 64, 'min_patches': 1000, 'max_patches': 1000,
    'max_slice_nums': 1000, 'scale_resolution': _LONGEST_EDGE, 'image_seq_length': 1 << 20, 'image_seq_len': 1 << 20,
    'num_image_tokens': 1 << 20, 'min_pixels': MAX_PIXELS, 'max_pixels': _MOST_PIXELS,
}  # fmt: skip
_OF_AREAS = {'merge_size', 'temporal_patch_size'}  # Qwen-VL's: its "edges" of a size are numbers of pixels
_LOW_AREA, _HIGH_AREA = ('shortest_edge', 'min_pixels'), ('longest_edge', 'max_pixels')
_SIZES = ('size', 'crop_size', 'max_image_size', 'pad_size')


def check_image_settings(values: Mapping[str, Any], *, settings: Mapping[str, Any], source: str) -> None:
    """Raise unless every setting that is known here is what an image processor can have.

    Args:
        values: of the model's files, or of a complete image processor.
        settings: those of them that a config names.
        source: of the model, for messages.

    Raises:
        ConfigError: a setting of the config is none.
        ModelError: one of the model's files is none.
    """
    by_area = not _OF_AREAS.isdisjoint(values)
    wrong = {name: says for name, value in values.items() if (says := _expected(name, value, by_area=by_area))}
    for low, high in (('min_pixels', 'max_pixels'), ('min_patches', 'max_patches')):
        if not {low, high} & set(wrong) and {low, high} <= set(values) and values[low] > values[high]:
            if low in settings and high not in settings:
                wrong[low] = f'at most {high}={values[high]}'
            else:
                wrong[high] = f'at least {low}={values[low]}'
    for name, says in wrong.items():
        found = f'{name}={str(values[name])[:80]}; expected {says}'
        if name in settings or (name == 'size' and {'min_pixels', 'max_pixels'} & set(settings)):
            raise ConfigError(f'image_processor: {found}')
        raise ModelError(f'{source}: preprocessor_config.json: {found}')


def _expected(name: str, value: Any, *, by_area: bool) -> str:
    """What a setting has to be where it is not that, else ''."""
    if name in _COUNTS:
        return '' if _is_count(value, _COUNTS[name]) else f'a whole number from 1 to {_COUNTS[name]:,}'
    if value is None:
        return ''
    if name in _SIZES:
        return _expected_size(value, by_area=by_area and name == 'size')
    if name == 'rescale_factor':
        return '' if _is_number(value) and value > 0 else 'a number above 0'
    if name in ('image_mean', 'image_std'):
        three = _is_list(value) and len(value) == 3 and all(map(_is_number, value))
        return '' if three and (name == 'image_mean' or min(value) > 0) else 'three numbers, of a deviation above 0'
    if name == 'resample':
        return '' if _is_count(value + 1 if isinstance(value, int) else None, 6) else 'a filter of Pillow, 0 to 5'
    if name == 'image_grid_pinpoints':
        pairs = _is_list(value) and value and all(_is_list(pair) and len(pair) == 2 for pair in value)
        pairs = pairs and all(_is_count(edge, _LONGEST_EDGE) for pair in value for edge in pair)
        return '' if pairs else 'a list of pairs [height, width]'
    return ''


def _expected_size(value: Any, *, by_area: bool) -> str:
    edges = dict(value) if isinstance(value, Mapping) else {'edge': value}
    most = dict.fromkeys(_LOW_AREA, MAX_PIXELS) | dict.fromkeys(_HIGH_AREA, _MOST_PIXELS) if by_area else {}
    for name, edge in edges.items():
        if edge is not None and not _is_count(edge, most.get(name, _LONGEST_EDGE)):
            return f'edges from 1 to {most.get(name, _LONGEST_EDGE):,}'
    low, high = edges.get('shortest_edge'), edges.get('longest_edge')
    return 'a shortest_edge of at most longest_edge' if low and high and low > high else ''


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_model_sizes(image_processor: Any, settings: Mapping[str, Any], *, vision: Any) -> None:
    """Patches and tiles are as the model's vision encoder takes them.

    Args:
        image_processor: complete.
        settings: those that a config names.
        vision: ``vision_config`` of the model.

    Raises:
        ConfigError: a setting makes others.
    """
    expected = {name: getattr(vision, theirs, None) for name, theirs in _MODEL_SIZES.items()}
    if hasattr(image_processor, 'crop_to_patches'):  # InternVL: an image is cut into tiles of the encoder's size
        side = vision.image_size
        expected['size'] = dict(zip(('height', 'width'), (side, side) if isinstance(side, int) else side, strict=True))
    for name, size in expected.items():
        if name in settings and size is not None and settings[name] != size:
            raise ConfigError(
                f'image_processor: {name}={settings[name]}, but the vision encoder of the model is built for {size}; '
                f'remove {name}'
            )
