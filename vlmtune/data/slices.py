"""MiniCPM-V 2.0: an image as a small view of the whole and, where it is large, a grid of slices, each of its own shape.

Whole view and slices have about ``scale_resolution`` ** 2 pixels and sides of whole patches; nothing is padded. The
rules are those of LLaVA-UHD (https://arxiv.org/abs/2403.11703) as the model's own code rounds them.

Letters: I images, N views (wholes and slices), P patches of all of them, C = 3 channels, D pixels of a patch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.processing_utils import ImagesKwargs

from vlmtune.data.pixels import finish_pixels
from vlmtune.data.placeholders import ImageTokens, Runs
from vlmtune.structures import ImageSize

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

START, END, GRID_START, GRID_END = '<image>', '</image>', '<slice>', '</slice>'


class Slices(NamedTuple):
    """How an image is cut.

    Attributes:
        whole: pixels of the view of the whole image.
        rows, columns: of slices; 0 where there are none.
        slice: pixels of each slice.
    """

    whole: ImageSize
    rows: int = 0
    columns: int = 0
    slice: ImageSize = ImageSize(0, 0)


class SliceSettings(ImagesKwargs, total=False):
    """What an image processor of slices knows beside what all know.

    Attributes:
        max_slice_nums: most slices of an image, 1 or more; 1 shows the whole alone.
        scale_resolution: pixels along the edge of a square view.
        patch_size: pixels along the edge of a patch.
    """

    max_slice_nums: int
    scale_resolution: int
    patch_size: int


class SliceImageProcessor(PilBackend):
    """Makes patches of all views of all images; one image after the other, the whole first, then slices row by row."""

    valid_kwargs = SliceSettings
    model_input_names = ['pixel_values', 'patch_grids']  # noqa: RUF012  # as the base class has it
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    max_slice_nums = 9
    scale_resolution = 448
    patch_size = 14

    def preprocess(self, images: Any, *args: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """One image of Pillow or a list of them -> pixel_values float32[P, C * D], patch_grids long[N, 2].

        Raises:
            TypeError: a setting is given here; settings belong to the object.
        """
        if args or kwargs:
            raise TypeError(f'{sorted(kwargs) or args} belong to the image processor, not to a call of it')
        shown = [images] if isinstance(images, Image.Image) else list(images)
        made = finish_pixels(self, sliced_patches(self, [image.convert('RGB') for image in shown]))
        return BatchFeature(made, tensor_type=return_tensors)


def sliced_patches(image_processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The patches of all views of all images.

    Args:
        image_processor: a ``SliceImageProcessor``.
        images: in RGB.

    Returns:
        pixel_bytes uint8[P, C, D]; patch_grids long[N, 2], the rows and columns of patches of every view.
    """
    patch = image_processor.patch_size
    patches: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for image in images:
        plan = _plan(image_processor, ImageSize(image.height, image.width))
        for view in _views(image, plan, resample=image_processor.resample):
            rows, columns = view.shape[0] // patch, view.shape[1] // patch
            blocks = view.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
            patches.append(torch.from_numpy(np.ascontiguousarray(blocks)).view(rows * columns, 3, patch**2))
            grids.append((rows, columns))
    return dict(pixel_bytes=torch.cat(patches), patch_grids=torch.tensor(grids))


def _views(image: Image.Image, plan: Slices, *, resample: int) -> Iterator[np.ndarray]:
    """uint8[H, W, C] of the whole and of every slice."""
    whole, (height, width) = plan.whole, plan.slice
    yield np.asarray(image.resize((whole.width, whole.height), resample=resample))
    if not plan.rows:
        return
    canvas = np.asarray(image.resize((width * plan.columns, height * plan.rows), resample=resample))
    for row in range(plan.rows):
        for column in range(plan.columns):
            yield canvas[row * height : (row + 1) * height, column * width : (column + 1) * width]


def slice_marks(processor: 'Processor', size: ImageSize, *, images: int) -> ImageTokens:
    """The whole image between its marks, then the rows of slices, each slice between marks of its own."""
    settings = processor.image_processor
    plan = _plan(settings, size)
    unknown = str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))
    view: Runs = [(START, 1), (unknown, processor.config.query_num), (END, 1)]
    runs = list(view)
    for row in range(plan.rows):
        runs += [(GRID_START if row == 0 else '\n', 1), *(view * plan.columns)]
    if plan.rows:
        runs.append((GRID_END, 1))
    views = [plan.whole, *[plan.slice] * (plan.rows * plan.columns)]
    return ImageTokens(runs, sum(view.height * view.width for view in views) // settings.patch_size**2)


# ---- arithmetic


def _plan(image_processor: Any, size: ImageSize) -> Slices:
    return plan_slices(
        size,
        most=image_processor.max_slice_nums,
        side=image_processor.scale_resolution,
        patch=image_processor.patch_size,
    )


def plan_slices(size: ImageSize, *, most: int, side: int, patch: int) -> Slices:
    """How an image is cut.

    Args:
        size: of the image.
        most: slices.
        side: pixels along the edge of a square view.
        patch: pixels along the edge of a patch.
    """
    whole = _scaled(size.height, size.width, side=side, patch=patch)
    wanted = min(math.ceil(size.height * size.width / side**2), most)
    if wanted <= 1:
        return Slices(whole)
    rows, columns = _best_grid(size, wanted, most=most)
    # A slice is a share of the image in whole pixels, scaled like an image of its own.
    height, width = max(round(size.height / rows), 1), max(round(size.width / columns), 1)
    return Slices(whole, rows, columns, _scaled(height, width, side=side, patch=patch))


def _best_grid(size: ImageSize, wanted: int, *, most: int) -> tuple[int, int]:
    """Rows and columns of about ``wanted`` slices, nearest to the shape of the image; of equals the first."""
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= most]
    grids = [(count // columns, columns) for count in counts for columns in range(1, count + 1) if not count % columns]
    shape = math.log(size.width / size.height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[1] / grid[0])))


def _scaled(height: int, width: int, *, side: int, patch: int) -> ImageSize:
    """The size in which a picture of this shape has about ``side`` ** 2 pixels and whole patches."""
    ratio = width / height
    height = int(side / math.sqrt(ratio))
    width = int(height * ratio)
    return ImageSize(*(max(round(length / patch) * patch, patch) for length in (height, width)))
