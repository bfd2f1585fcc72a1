"""Random changes of images while training: other colours, the blocks of a JPEG file; never another size.

What is drawn for an image is a function of (seed, epoch, sample, number of the image in it) and of nothing else: not of
the worker or the rank that draws, nor of what was drawn before. So a run repeats, and so does one that was resumed.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance

from vlmtune.registry import build_callable
from vlmtune.utils.errors import ConfigError, DataError

ImageTransform: TypeAlias = Callable[[Image.Image, np.random.Generator], Image.Image]
TransformSetting: TypeAlias = ImageTransform | Mapping[str, Any]

_TRIED_ON = (48, 32)  # pixels; no square, so that a transform that turns images is found


@dataclass(frozen=True)
class Augmentation:
    """The transforms of a data set, one after the other, each on what the one before it made.

    Attributes:
        transforms: called as ``transform(image, rng)``; give an RGB image of the same size.
        seed: of the run.
    """

    transforms: tuple[ImageTransform, ...]
    seed: int

    def __call__(self, images: Sequence[Image.Image], *, epoch: int, sample: int) -> list[Image.Image]:
        """The images of one sample, changed.

        Args:
            images: RGB, in the order of the sample.
            epoch: the same sample looks different in another one.
            sample: its number in its data set.

        Raises:
            DataError: a transform gives anything but an RGB image of the same size.
        """
        return [
            self._change(image, np.random.default_rng((self.seed, epoch, sample, number)))
            for number, image in enumerate(images)
        ]

    def _change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for transform in self.transforms:
            changed = transform(image, rng)
            if not isinstance(changed, Image.Image) or changed.mode != 'RGB' or changed.size != image.size:
                raise DataError(
                    f'image_transform {_name(transform)} made {_in_words(changed)} of {_in_words(image)}; expected an '
                    'RGB image of the same size, with which the length of the sample was planned',
                    kind='unfit_sample',
                )
            image = changed
        return image


def build_augmentation(
    setting: TransformSetting | Sequence[TransformSetting] | None, *, seed: int
) -> Augmentation | None:
    """The augmentation of a data set, tried on a small image; None where there is none.

    Args:
        setting: a callable, ``dict(type=color_jitter, ...)``, or several of them in a list.
        seed: of the run.

    Raises:
        ConfigError: a setting of a transform is out of range.
        DataError: a transform changes the size of an image.
        TypeError: something that cannot be called.
    """
    if setting is None:
        return None
    several = [setting] if callable(setting) or isinstance(setting, Mapping) else setting
    made = Augmentation(tuple(build_callable(one) for one in several), seed)
    made([Image.new('RGB', _TRIED_ON)], epoch=0, sample=0)  # a mistake shows now, and not in a worker
    return made


def color_jitter(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Image.Image:
    """Other colours: each setting is how far its factor may lie from 1, drawn evenly; they are applied in random order.

    Args:
        image: RGB.
        rng: draws the factors.
        brightness, contrast, saturation: 0 to 1; 0.2 draws factors from 0.8 to 1.2.
        hue: 0 to 0.5, in turns of the circle of colours; 0.5 may change any colour into any other.

    Raises:
        ConfigError: a setting is out of range.
    """
    strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    for name, strength in strengths.items():
        most = 0.5 if name == 'hue' else 1
        if not 0 <= strength <= most:
            raise ConfigError(f'color_jitter: {name}={strength}; expected 0 to {most}')
    wanted = [name for name, strength in strengths.items() if strength]
    for name in rng.permutation(wanted).tolist():
        shift = rng.uniform(-strengths[name], strengths[name])
        image = _turn_hue(image, shift) if name == 'hue' else _ENHANCERS[name](image).enhance(1 + shift)
    return image


_ENHANCERS = dict(brightness=ImageEnhance.Brightness, contrast=ImageEnhance.Contrast, saturation=ImageEnhance.Color)


def _turn_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert('HSV').split()
    turned = hue.point([(level + round(shift * 256)) % 256 for level in range(256)])
    return Image.merge('HSV', (turned, saturation, value)).convert('RGB')


def jpeg_compression(
    image: Image.Image, rng: np.random.Generator, *, quality: tuple[int, int] = (30, 95)
) -> Image.Image:
    """What remains of an image in a JPEG file.

    Args:
        image: RGB.
        rng: draws the quality.
        quality: the lowest and the highest, both drawn; 1 to 100.

    Raises:
        ConfigError: the two are out of range or in the wrong order.
    """
    lowest, highest = quality
    if not 1 <= lowest <= highest <= 100:
        raise ConfigError(f'jpeg_compression: quality={quality}; expected (lowest, highest), both of 1 to 100')
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=int(rng.integers(lowest, highest, endpoint=True)))
    with Image.open(file, formats=('JPEG',)) as compressed:
        return compressed.convert('RGB')


def _name(transform: ImageTransform) -> str:
    function = getattr(transform, 'func', transform)  # of a partial
    return getattr(function, '__name__', type(function).__name__)


def _in_words(image: Any) -> str:
    if not isinstance(image, Image.Image):
        return f'{type(image).__name__}'
    return f'{image.width} x {image.height} pixels ({image.mode})'
