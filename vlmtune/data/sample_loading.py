"""A planned sample -> tensors: here, and nowhere before, pixels are decoded."""

import numpy as np
import torch
from PIL import Image

from vlmtune.data.images import Root, load_image
from vlmtune.data.processor import Processor
from vlmtune.ops import mrope_positions
from vlmtune.structures import IGNORE_INDEX, Sample
from vlmtune.utils.errors import DataError


def load_images(sample: Sample, *, root: Root) -> list[Image.Image]:
    """The images of a sample, in the sizes that they were planned with.

    Raises:
        DataError: one turns out to be broken, or was changed since it was planned.
    """
    images = [load_image(image, root=root) for image in sample.images]
    for ref, image, planned in zip(sample.images, images, sample.image_sizes, strict=True):
        if (image.height, image.width) != planned:
            raise DataError(
                f'image {ref} has {image.width} x {image.height} pixels, but had {planned.width} x '
                f'{planned.height} when the run started; leave the images alone while training',
                kind='broken_image',
            )
    return images


def blank_images(sample: Sample) -> list[Image.Image]:
    """Black images of the planned sizes: the plan stands where the true ones cannot be decoded."""
    return [Image.new('RGB', (width, height)) for height, width in sample.image_sizes]


def to_tensors(
    sample: Sample, inputs: dict[str, torch.Tensor], *, processor: Processor, supervised: bool
) -> dict[str, torch.Tensor]:
    """Tensors of one sample.

    Args:
        sample: as planned.
        inputs: of its images.
        processor: of the model to train.
        supervised: False makes a filler of it, of which nothing is learned.

    Returns:
        input_ids long[L], labels long[L], position_ids long[L] or long[4, L], token types where the family has them,
        and the image inputs.
    """
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))
    labels = torch.from_numpy(sample.labels.astype(np.int64))
    if not supervised:
        labels = torch.full_like(labels, IGNORE_INDEX)
    inputs = {**inputs, **processor.token_types(ids, labels)}
    return dict(input_ids=ids, labels=labels, position_ids=_positions(ids, inputs, processor=processor), **inputs)


def _positions(ids: torch.Tensor, inputs: dict[str, torch.Tensor], *, processor: Processor) -> torch.Tensor:
    text = torch.arange(len(ids))
    if processor.family.positions == 'rope':
        return text
    grid = inputs.get('image_grid_thw', torch.empty(0, 3, dtype=torch.long))
    axes = mrope_positions(
        ids,
        image_token_id=processor.image_token_id,
        image_grid_thw=grid,
        merge_size=processor.image_processor.merge_size,
    )
    return torch.cat([text[None], axes])  # transformers reads the sample borders from the first axis
