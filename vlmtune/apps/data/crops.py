"""Pictures of which the model sees only the middle."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlmtune.data import Processor
from vlmtune.structures import ImageSize

LOST = 0.25
"""The share of its area from which on a picture counts as cropped."""


@dataclass(frozen=True)
class Crops:
    """What the image processor cuts away.

    Attributes:
        share: of the pictures, those that lose more than ``LOST`` of their area.
        setting: what shows them whole.
    """

    share: float
    setting: str


def find_crops(processor: Processor, sizes: Iterable[ImageSize]) -> Crops | None:
    """Whether pictures are cropped as CLIP does it: scaled by the shorter side, then cut in the middle.

    Args:
        processor: of the model.
        sizes: of the pictures.

    Returns:
        None where no picture loses much.
    """
    image_processor = processor.image_processor
    whole = ('do_pad', 'image_grid_pinpoints')  # to squares; in tiles, which are never cropped
    if not getattr(image_processor, 'do_center_crop', None) or any(getattr(image_processor, n, None) for n in whole):
        return None
    size, crop = dict(image_processor.size or {}), dict(image_processor.crop_size)
    lost = [1 - _kept(picture, size=size, crop=crop) > LOST for picture in sizes]
    if not any(lost):
        return None
    setting = f'image_processor=dict(do_center_crop=False, size=dict(height={crop["height"]}, width={crop["width"]}))'
    return Crops(sum(lost) / len(lost), setting)


def _kept(picture: ImageSize, *, size: dict[str, Any], crop: dict[str, Any]) -> float:
    """The share of a picture's area that is left."""
    scale = (size.get('shortest_edge') or 0) / min(picture)
    height, width = (scale * picture.height, scale * picture.width) if scale else (size['height'], size['width'])
    return min(1, crop['height'] / height) * min(1, crop['width'] / width)
