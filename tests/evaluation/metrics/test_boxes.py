import random

import numpy as np
import pytest

from vlmtune.data import Processor
from vlmtune.data.boxes import write_boxes
from vlmtune.evaluation import box_iou
from vlmtune.evaluation.metrics.boxes import matched_overlaps, overlap
from vlmtune.structures import BoxPart, Conversation, ImagePart, ImageRef, ImageSize, Message

SIZE = [640, 480]  # width, height, as in prediction rows


@pytest.fixture(scope='module')
def processor(tiny_model):
    return Processor(str(tiny_model('qwen3_vl')))  # counts thousandths


def area(box):
    """The pixels that a box of whole numbers covers."""
    mask = np.zeros((40, 40), dtype=bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


def test_overlap_is_that_of_counted_pixels():
    draw = random.Random(0)
    shares = []
    for _ in range(300):
        one, other = (
            [*low, *(value + draw.randint(1, 25) for value in low)]
            for low in ([draw.randint(0, 15), draw.randint(0, 15)] for _ in range(2))
        )
        covered, other_covered = area(one), area(other)
        expected = (covered & other_covered).sum() / (covered | other_covered).sum()
        assert overlap(one, other) == pytest.approx(expected)
        shares.append(expected)
    assert min(shares) == 0
    assert max(shares) > 0.5
    assert overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_each_box_has_one_partner_the_best_first():
    boxes, others = [(0, 0, 10, 10), (0, 0, 10, 8)], [(0, 0, 10, 10), (20, 20, 30, 30)]
    assert matched_overlaps(boxes, others) == [1.0]
    assert matched_overlaps(boxes, boxes) == [1.0, 1.0]


def score(processor, prediction, reference, *, size=SIZE, **options):
    return box_iou([prediction], [[reference]], samples=[dict(image_sizes=[size])], processor=processor, **options)


def test_one_box(processor):
    assert score(processor, '[0, 0, 500, 500]', '[0, 0, 500, 500]') == dict(box_iou=1, box_f1=1)
    half = score(processor, 'It is {"bbox_2d": [0, 0, 500, 250]}', '[0, 0, 500, 500]')
    assert half == dict(box_iou=pytest.approx(0.5), box_f1=1)
    assert score(processor, '[0, 0, 500, 240]', '[0, 0, 500, 500]')['box_f1'] == 0
    assert score(processor, '[0, 0, 500, 240]', '[0, 0, 500, 500]', threshold=0.4)['box_f1'] == 1


def test_boxes_too_many_or_too_few(processor):
    two = '[0, 0, 500, 500] [600, 600, 900, 900]'
    assert score(processor, '[0, 0, 500, 500]', two) == dict(box_iou=0.5, box_f1=pytest.approx(2 / 3))
    assert score(processor, two, '[0, 0, 500, 500]') == dict(box_iou=0.5, box_f1=pytest.approx(2 / 3))
    assert score(processor, 'nothing', two) == dict(box_iou=0, box_f1=0)
    assert score(processor, 'nothing', 'none') == dict(box_iou=1, box_f1=1)


def test_what_leaves_the_image_is_cut_off_at_its_edge(processor):
    assert score(processor, '[0, 0, 2000, 1000]', '[0, 0, 1000, 1000]')['box_iou'] == 1


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'qwen3_vl', 'llava'])
def test_boxes_in_pixels_score_as_the_convention_of_the_family(tiny_model, name):
    processor, (width, height) = Processor(str(tiny_model(name))), SIZE

    def text(box):
        answer = Message('assistant', (ImagePart(0), BoxPart(0, box, 'pixel')))
        row = Conversation((answer,), (ImageRef(path='x.png'),))
        written = write_boxes(row, processor=processor, image_sizes=[ImageSize(height=height, width=width)])
        return written.messages[0].text

    found = score(processor, text((0, 0, 320, 240)), text((0, 0, 320, 480)))
    assert found['box_iou'] == pytest.approx(0.5, abs=0.02)  # rounding to a share of 100, or of a small image


def test_rows_without_such_an_image_do_not_count(processor, caplog):
    rows = [dict(image_sizes=[SIZE]), dict(image_sizes=[]), dict(image_sizes=[SIZE, SIZE])]
    options = dict(samples=rows, processor=processor)
    texts = ['a cat', '(10, 20), (30, 40)', 'a dog']
    found = box_iou(texts, [['a cat']] * 3, **options)
    assert found == dict(box_iou=1.0, box_f1=1.0)
    assert 'box_iou: 1 of 3 rows have no image 0 and do not count' in caplog.text
    assert 'box_iou: no reference holds a box' in caplog.text  # in another convention, for example
    assert box_iou(texts, [['a cat']] * 3, image=1, **options) == dict(box_iou=1.0, box_f1=1.0)
    assert box_iou(texts, [['a cat']] * 3, image=2, **options) == {}
