"""Boxes: written into a conversation as the family writes them, read from answers, drawn.

A box is (left, top, right, bottom). Sources of the conventions and text forms that ``families.py`` names:

- shares of 1000, ``(x1,y1),(x2,y2)``: Qwen2-VL, arXiv 2409.12191 section 2.2 (its box tokens are left out: the text of
  a row never becomes control tokens).
- shares of 1000, ``[[x1, y1, x2, y2]]``: InternVL, internvl.readthedocs.io, "Chat Data Format", grounding.
- shares of 1000, ``[x1, y1, x2, y2]``: Qwen3-VL, cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL.
- pixels of the resized image, ``[x1, y1, x2, y2]``: Qwen2.5-VL, QwenLM/Qwen3-VL issues 676 and 866.
- shares of 1 with two decimals, ``[x1, y1, x2, y2]``: LLaVA-1.5's training data, haotian-liu/LLaVA issue 606.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmtune.structures import BoxPart, Conversation, ImageSize, Part, TextPart
from vlmtune.utils.errors import DataError

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

Box: TypeAlias = tuple[float, float, float, float]

_NUMBER = r'(-?\d+(?:\.\d+)?)'
_PAIR = rf'{_NUMBER}\s*,\s*{_NUMBER}'
# [x1, y1, x2, y2], (x1, y1, x2, y2), (x1,y1),(x2,y2) and [x1, y1], [x2, y2]
_WRITTEN_BOX = re.compile(rf'[\[(]\s*{_PAIR}\s*(?:,|[\])]\s*,?\s*[\[(])\s*{_PAIR}\s*[\])]')
_COLOURS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#008080', '#f032e6', '#9a6324')


def write_boxes(
    conversation: Conversation, *, processor: 'Processor', image_sizes: Sequence[ImageSize]
) -> Conversation:
    """The conversation with its boxes as text, in the convention and form of the model's family.

    Args:
        conversation: with boxes, or without: then it comes back as it is.
        processor: names the family, and knows in which size the model sees an image.
        image_sizes: one per image of the conversation, upright.

    Raises:
        DataError: a box that is none, or does not lie on its image.
    """
    if not any(isinstance(part, BoxPart) for message in conversation.messages for part in message.parts):
        return conversation
    messages = []
    for message in conversation.messages:
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, BoxPart):
                part = TextPart(_write(part, processor, image_sizes))
            if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
                parts[-1] = TextPart(parts[-1].text + part.text)  # one text, lest the template separates them
            else:
                parts.append(part)
        messages.append(dataclasses.replace(message, parts=tuple(parts)))
    return dataclasses.replace(conversation, messages=tuple(messages))


def pixel_boxes(conversation: Conversation, *, image_sizes: Sequence[ImageSize]) -> list[list[Box]]:
    """The boxes on each image of a conversation, in pixels of the upright image.

    Raises:
        DataError: a box that is none, or does not lie on its image.
    """
    found: list[list[Box]] = [[] for _ in image_sizes]
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, BoxPart):
                left, top, right, bottom = _shares(part, image_sizes)
                height, width = image_sizes[part.image]
                found[part.image].append((left * width, top * height, right * width, bottom * height))
    return found


def read_boxes(text: str, *, processor: 'Processor', image_size: ImageSize) -> list[Box]:
    """The boxes in an answer, in pixels of the upright image; the inverse of ``write_boxes``.

    Any four numbers in brackets count, whatever stands around them: ``[x1, y1, x2, y2]``, ``(x1,y1),(x2,y2)``, the
    value of ``"bbox_2d"`` in JSON. What overshoots the image is cut off; what lies outside it or is turned inside out
    is no box.

    Args:
        text: what the model wrote.
        processor: names the family.
        image_size: of the image that the boxes lie on, upright.
    """
    across, down = _full_scale(processor, image_size)
    boxes = []
    for match in _WRITTEN_BOX.finditer(text):
        left, top, right, bottom = map(float, match.groups())
        if left <= right and top <= bottom and left <= across and top <= down and right >= 0 and bottom >= 0:
            x, y = image_size.width / across, image_size.height / down
            boxes.append((max(left, 0) * x, max(top, 0) * y, min(right, across) * x, min(bottom, down) * y))
    return boxes


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of ``image`` in RGB with ``boxes``, in pixels of that image, outlined and numbered from 1."""
    drawn = image.convert('RGB')  # a copy also of an RGB image
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(min(image.size) / 200))
    for i, (left, top, right, bottom) in enumerate(boxes):
        colour = _COLOURS[i % len(_COLOURS)]
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        pen.text((left + line + 1, top + line), str(i + 1), fill=colour)
    return drawn


def _write(part: BoxPart, processor: 'Processor', sizes: Sequence[ImageSize]) -> str:
    shares = _shares(part, sizes)
    across, down = _full_scale(processor, sizes[part.image])
    numbers = [share * scale for share, scale in zip(shares, (across, down, across, down), strict=True)]
    family = processor.family
    decimals = 2 if family.boxes == 'unit' else 0
    return family.box_text.format(*(f'{number:.{decimals}f}' for number in numbers))


def _full_scale(processor: 'Processor', size: ImageSize) -> tuple[float, float]:
    """The numbers that stand for the right and the bottom edge of an image."""
    if processor.family.boxes == 'unit':
        return 1.0, 1.0
    if processor.family.boxes == 'thousand':
        return 1000.0, 1000.0
    images = processor.image_processor
    try:
        height, width = smart_resize(
            size.height,
            size.width,
            factor=images.patch_size * images.merge_size,
            min_pixels=images.size['shortest_edge'],
            max_pixels=images.size['longest_edge'],
        )
    except ValueError as error:
        raise _wrong(f'an image of {size.width}x{size.height} pixels cannot be used: {error}') from error
    return float(width), float(height)


def _shares(part: BoxPart, sizes: Sequence[ImageSize]) -> Box:
    """A checked box as shares of 1. An overshoot of one pixel, or of a thousandth, is cut off: it comes from rounding.

    Raises:
        DataError: see ``write_boxes``.
    """
    if not 0 <= part.image < len(sizes):
        raise _wrong(f'has a box on image {part.image} but {len(sizes)} images; expected the image of the box')
    height, width = sizes[part.image]
    full = {'pixel': (width, height), 'unit': (1, 1), 'thousand': (1000, 1000)}[part.convention]
    slack = 0.001 if part.convention == 'unit' else 1
    name = f'box {list(part.box)} of image {part.image} ({width}x{height} pixels), with boxes={part.convention!r},'
    for low, high, end in ((part.box[0], part.box[2], full[0]), (part.box[1], part.box[3], full[1])):
        if not low < high:
            raise _wrong(f'{name} is empty or turned; expected x1 < x2 and y1 < y2')
        if low < -slack or high > end + slack or high <= 0 or low >= end:
            raise _wrong(f'{name} leaves the image; expected 0 to {full[0]} and 0 to {full[1]}: fix the row or boxes=')
    if part.convention != 'unit' and max(part.box) <= 1:
        raise _wrong(f"{name} is hardly a point; if the data set counts from 0 to 1, set boxes='unit'")
    left, top, right, bottom = (
        min(max(value / end, 0.0), 1.0) for value, end in zip(part.box, (*full, *full), strict=True)
    )
    return left, top, right, bottom


def _wrong(message: str) -> DataError:
    return DataError(message, kind='wrong_box')
