"""Metrics of boxes in answers, in pixels of the upright image whatever the model counts."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data import Processor
from vlmtune.data.boxes import Box, read_boxes
from vlmtune.evaluation.metrics.pairs import References, in_pairs
from vlmtune.structures import ImageSize

logger = logging.getLogger(__name__)


def box_iou(
    predictions: Sequence[str],
    references: References,
    *,
    samples: Sequence[Mapping[str, Any]],
    processor: Processor,
    image: int = 0,
    threshold: float = 0.5,
) -> dict[str, float]:
    """How well the boxes in answers cover those of the references: ``box_iou`` and ``box_f1``, both in [0, 1].

    Both texts are read in the convention of the model's family and brought to pixels of the upright image. The boxes of
    an answer are matched with those of its reference, one to one, the best overlap first. ``box_iou`` is the sum of the
    overlaps by the larger number of boxes; ``box_f1`` counts pairs that overlap by ``threshold`` or more. With one box
    each they are the IoU and the Acc@0.5 of referring expressions. Without boxes in both, an answer is right. Rows
    without such an image do not count; where no row has one, there is no score.

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several; the best counts.
        samples: the prediction rows; ``image_sizes`` are [width, height].
        processor: names the family, and knows in which size the model sees an image.
        image: of the row, on which the boxes lie, from 0.
        threshold: intersection by union.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    overlaps, f1, boxes_expected = [], [], 0
    for i, (prediction, found) in enumerate(in_pairs(predictions, references)):
        sizes = samples[i]['image_sizes']
        if not -len(sizes) <= image < len(sizes):
            continue
        width, height = sizes[image]
        size = ImageSize(height=height, width=width)
        ours = read_boxes(prediction, processor=processor, image_size=size)
        theirs = [read_boxes(reference, processor=processor, image_size=size) for reference in found]
        boxes_expected += sum(map(len, theirs))
        pairs = [(matched_overlaps(ours, boxes), len(boxes)) for boxes in theirs]
        overlaps.append(max(_share(sum(matched), max(len(ours), count)) for matched, count in pairs))
        f1.append(max(_share(2 * sum(o >= threshold for o in matched), len(ours) + count) for matched, count in pairs))
    left_out = len(samples) - len(overlaps)
    if not overlaps:
        return {}
    if left_out:
        logger.warning('box_iou: %d of %d rows have no image %d and do not count', left_out, len(samples), image)
    if not boxes_expected and len(overlaps) > 1:
        logger.warning('box_iou: no reference holds a box as the model writes them, so that answers without are right')
    return dict(box_iou=statistics.fmean(overlaps), box_f1=statistics.fmean(f1))


def matched_overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> list[float]:
    """Intersection by union of each pair, the best first; no box is in two pairs, and pairs apart are none."""
    pairs = sorted(
        ((overlap(box, other), i, k) for i, box in enumerate(boxes) for k, other in enumerate(others)), reverse=True
    )
    found, used, taken = [], set(), set()
    for share, i, k in pairs:
        if share > 0 and i not in used and k not in taken:
            found.append(share)
            used.add(i)
            taken.add(k)
    return found


def overlap(box: Box, other: Box) -> float:
    """Intersection by union of two boxes (left, top, right, bottom); 0 where both are empty."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(across, 0.0) * max(down, 0.0)
    union = sum((right - left) * (bottom - top) for left, top, right, bottom in (box, other)) - shared
    return shared / union if union > 0 else 0.0


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0
