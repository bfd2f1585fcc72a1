"""What ``vlmtune browse-data`` shows of a sample, whatever it is shown on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmtune.apps.data.train_data import DataPart
from vlmtune.data import Processor, SupervisedDataset
from vlmtune.data.boxes import Box, draw_boxes, pixel_boxes
from vlmtune.data.images import Root, load_image, read_image_size
from vlmtune.data.token_runs import TokenRun, token_runs
from vlmtune.structures import IGNORE_INDEX, ImageRef, ImageSize
from vlmtune.utils.errors import DataError

_SIDE = 400  # pixels, the longest side of a picture


@dataclass(frozen=True)
class ShownImage:
    """One image, scaled down, boxes drawn; ``picture`` is None where it cannot be decoded, and ``trouble`` says why."""

    name: str
    size: ImageSize
    boxes: int
    picture: Image.Image | None
    trouble: str = ''


@dataclass(frozen=True)
class ShownSample:
    """One sample; ``supervised`` counts what is learned, the first token of a sample never is."""

    index: int
    where: str
    tokens: int
    supervised: int
    patches: int
    runs: list[TokenRun]
    images: list[ShownImage]


@dataclass(frozen=True)
class ShownPack:
    """A pack or a batch: (sample, where, tokens) of everything in it, and the tokens that it has room for."""

    number: int
    samples: list[tuple[int, str, int]]
    room: int

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(tokens for _, _, tokens in self.samples)


def show_sample(
    index: int, *, part: DataPart, dataset: SupervisedDataset, at: int, processor: Processor
) -> ShownSample:
    """Sample ``at`` of a data set, called ``index``."""
    sample = dataset.samples[at]
    conversation = part.map_row(part.rows[dataset.row_of(at)])
    sizes = [read_image_size(ref, root=part.image_folder) for ref in conversation.images]
    boxes = pixel_boxes(conversation, image_sizes=sizes)
    shown = len(sample.images)  # fewer than the row has if its last turns were cut to fit
    images = [
        _show_image(ref, root=part.image_folder, size=size, boxes=on_it)
        for ref, size, on_it in zip(sample.images, sample.image_sizes, boxes[:shown], strict=True)
    ]
    return ShownSample(
        index=index,
        where=dataset.where(at),
        tokens=len(sample),
        supervised=int(np.count_nonzero(sample.labels[1:] != IGNORE_INDEX)),
        patches=sample.patches,
        runs=token_runs(sample, processor=processor),
        images=images,
    )


def _show_image(ref: ImageRef, *, root: Root, size: ImageSize, boxes: Sequence[Box]) -> ShownImage:
    try:
        picture = draw_boxes(load_image(ref, root=root), boxes)
    except DataError as error:
        return ShownImage(str(ref), size, len(boxes), None, str(error))
    picture.thumbnail((_SIDE, _SIDE))
    return ShownImage(str(ref), size, len(boxes), picture)
