"""Boxes in every family: written, read back, drawn."""

import random

import pytest
from PIL import ExifTags, Image

from vlmtune.data.boxes import draw_boxes, pixel_boxes, read_boxes, write_boxes
from vlmtune.data.images import read_image_size
from vlmtune.families import FAMILIES
from vlmtune.structures import BoxPart, Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.testing.tiny_models import list_tiny_models
from vlmtune.utils.errors import DataError

VISION = [name for name in list_tiny_models() if FAMILIES.get(name) is not None and FAMILIES[name].has_vision]
SIZE = ImageSize(height=300, width=400)


def ask(*boxes, images=1, before='See ', after='.'):
    """A question about images, and an answer with boxes."""
    question = (*(ImagePart(i) for i in range(images)), TextPart('Where?'))
    answer = Message('assistant', (TextPart(before), *boxes, TextPart(after)))
    return Conversation((Message('user', question), answer), tuple(ImageRef(path=f'{i}.png') for i in range(images)))


def written(processor, *boxes, sizes=(SIZE,)):
    return write_boxes(ask(*boxes, images=len(sizes)), processor=processor, image_sizes=sizes).messages[1].text


def test_every_family_is_here():
    assert len(VISION) >= 8


@pytest.mark.parametrize('convention', ['pixel', 'unit', 'thousand'])
@pytest.mark.parametrize('name', VISION)
def test_what_is_written_reads_back_within_half_a_unit(processor, name, convention):
    processor, draw = processor(name), random.Random(name + convention)
    for _ in range(100):
        size = ImageSize(draw.randint(20, 2000), draw.randint(20, 2000))
        full = {'pixel': (size.width, size.height), 'unit': (1, 1), 'thousand': (1000, 1000)}[convention]
        (left, right), (top, bottom) = (
            sorted((draw.uniform(0, end * 0.5), draw.uniform(end * 0.6, end))) for end in full
        )
        part = BoxPart(0, (left, top, right, bottom), convention)
        ((true,),) = pixel_boxes(ask(part), image_sizes=[size])
        (read,) = read_boxes(written(processor, part, sizes=[size]), processor=processor, image_size=size)
        units = {'unit': (100, 100), 'thousand': (1000, 1000)}.get(processor.family.boxes) or seen(processor, size)
        for i, (value, found) in enumerate(zip(true, read, strict=True)):
            unit = (size.width, size.height)[i % 2] / units[i % 2]
            assert abs(value - found) <= unit / 2 + 1e-6  # 1e-6: float arithmetic on up to 2,000 pixels


def seen(processor, size):
    """Width and height of an image as the model gets it, from real pixels."""
    images = processor.image_inputs([Image.new('RGB', (size.width, size.height))])
    _, rows, columns = images['image_grid_thw'][0].tolist()
    return columns * processor.image_processor.patch_size, rows * processor.image_processor.patch_size


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('qwen2_vl', 'See (100,500),(250,1000).'),
        ('qwen3_vl', 'See [100, 500, 250, 1000].'),
        ('internvl', 'See [[100, 500, 250, 1000]].'),
        ('llava', 'See [0.10, 0.50, 0.25, 1.00].'),
        ('smolvlm', 'See [100, 500, 250, 1000].'),
        ('qwen2_5_vl', 'See [11, 42, 28, 84].'),  # 400 x 300 becomes 112 x 84 under the tiny model's limit
    ],
)
def test_each_family_has_its_own_form(processor, name, text):
    for box, convention in (
        ((40, 150, 100, 300), 'pixel'),
        ((0.1, 0.5, 0.25, 1), 'unit'),
        ((100, 500, 250, 1000), 'thousand'),
    ):
        assert written(processor(name), BoxPart(0, box, convention)) == text


def test_pixels_of_the_resized_image_follow_the_resolution(processor):
    box = BoxPart(0, (0, 0, 1, 1), 'unit')
    for setting in ({}, dict(min_pixels=56 * 56, max_pixels=40 * 28 * 28)):
        mine = processor('qwen2_5_vl', **({'image_processor': setting} if setting else {}))
        width, height = seen(mine, SIZE)
        assert written(mine, box) == f'See [0, 0, {width}, {height}].'
    assert (width, height) > (112, 84)


def test_a_box_is_part_of_what_is_learned_and_of_one_text(processor):
    mine = processor('qwen2_vl')
    part = BoxPart(0, (40, 150, 100, 300), 'pixel')
    sample = mine.tokenize(ask(part, before='A dog ', after=' barks.'), image_sizes=[SIZE])
    learned = mine.tokenizer.decode([token for token in sample.labels if token >= 0])
    assert learned.startswith('A dog (100,500),(250,1000) barks.')
    conversation = write_boxes(ask(part, part), processor=mine, image_sizes=[SIZE])
    assert len(conversation.messages[1].parts) == 1
    without = ask(before='a', after='b')
    assert write_boxes(without, processor=mine, image_sizes=[SIZE]) is without


def test_each_box_lies_on_its_own_image(processor):
    sizes = [SIZE, ImageSize(height=100, width=50)]
    boxes = (BoxPart(1, (0, 0, 25, 50), 'pixel'), BoxPart(0, (0, 0, 200, 300), 'pixel'))
    assert written(processor('qwen3_vl'), *boxes, sizes=sizes) == 'See [0, 0, 500, 500][0, 0, 500, 1000].'
    assert pixel_boxes(ask(*boxes, images=2), image_sizes=sizes) == [[(0, 0, 200, 300)], [(0, 0, 25, 50)]]


def test_a_turned_photo_is_measured_upright(processor, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (400, 300)).save(tmp_path / 'photo.jpg', exif=exif)
    size = read_image_size(ImageRef(path=str(tmp_path / 'photo.jpg')))
    box = BoxPart(0, (0, 200, 300, 400), 'pixel')
    assert written(processor('qwen3_vl'), box, sizes=[size]) == 'See [0, 500, 1000, 1000].'


@pytest.mark.parametrize(
    ('box', 'convention', 'says'),
    [
        ((100, 0, 50, 50), 'pixel', 'empty or turned; expected x1 < x2 and y1 < y2'),
        ((0, 20, 50, 20), 'pixel', 'empty or turned'),
        ((0, float('nan'), 50, 20), 'pixel', 'empty or turned'),
        ((0, 0, 402, 50), 'pixel', r'box \[0, 0, 402, 50\] of image 0 \(400x300 pixels\).* leaves the image'),
        ((0, 0, 40, 310), 'pixel', 'expected 0 to 400 and 0 to 300'),
        ((-2, 0, 40, 50), 'pixel', 'leaves the image'),
        ((400, 0, 401, 50), 'pixel', 'leaves the image'),
        ((10, 20, 30, 40), 'unit', 'expected 0 to 1 and 0 to 1'),
        ((0, 0, 1001.5, 500), 'thousand', 'expected 0 to 1000'),
        ((0.1, 0.2, 0.3, 0.4), 'pixel', "hardly a point; if the data set counts from 0 to 1, set boxes='unit'"),
        ((0.1, 0.2, 0.3, 0.4), 'thousand', 'hardly a point'),
    ],
)  # fmt: skip
def test_a_box_that_is_none_is_told_with_its_numbers(processor, box, convention, says):
    with pytest.raises(DataError, match=says) as caught:
        written(processor('qwen3_vl'), BoxPart(0, box, convention))
    assert caught.value.kind == 'wrong_box'


def test_a_box_needs_its_image_and_an_image_must_not_be_a_thread(processor):
    with pytest.raises(DataError, match='has a box on image 1 but 1 images'):
        written(processor('qwen3_vl'), BoxPart(1, (0, 0, 9, 9), 'pixel'))
    with pytest.raises(DataError, match='an image of 9000x20 pixels cannot be used'):
        written(processor('qwen2_5_vl'), BoxPart(0, (0, 0, 9, 9), 'pixel'), sizes=[ImageSize(20, 9000)])


def test_an_overshoot_of_rounding_is_cut_off(processor):
    mine = processor('qwen3_vl')
    assert written(mine, BoxPart(0, (-0.4, -1, 400.6, 301), 'pixel')) == 'See [0, 0, 1000, 1000].'
    assert written(mine, BoxPart(0, (0, 0, 1.0005, 1), 'unit')) == 'See [0, 0, 1000, 1000].'


@pytest.mark.parametrize(
    ('text', 'boxes'),
    [
        ('[{"bbox_2d": [100, 500, 250, 1000], "label": "cup"}]', [(40, 150, 100, 300)]),
        ('```json\n[\n\t{"bbox_2d": [ 100,500 ,250,\n1000 ]}]\n```', [(40, 150, 100, 300)]),
        ('<box>[[100, 500, 250, 1000], [0, 0, 500, 500]]</box>', [(40, 150, 100, 300), (0, 0, 200, 150)]),
        ('a dog(100, 500), (250,1000) and a cat (0,0),(500,500).', [(40, 150, 100, 300), (0, 0, 200, 150)]),
        ('(100, 500, 250, 1000)', [(40, 150, 100, 300)]),
        ('[[100, 500], [250, 1000]]', [(40, 150, 100, 300)]),
        ('[100.0, 500, 250.0, 1004]', [(40, 150, 100, 300)]),
        ('[-3, 500, 250, 1000]', [(0, 150, 100, 300)]),
        ('[250, 500, 100, 1000]', []),
        ('[2019, 2020, 2021, 2022]', []),
        ('100, 500, 250, 1000', []),
        ('[1, 2, 3]', []),
        ('[1, 2, 3, 4, 5]', []),
        ('There is no dog.', []),
    ],
)
def test_reading_takes_what_models_write(processor, text, boxes):
    found = read_boxes(text, processor=processor('qwen3_vl'), image_size=SIZE)
    assert [tuple(round(number, 6) for number in box) for box in found] == boxes


def test_drawing_marks_the_edges_of_a_copy():
    image = Image.new('RGB', (80, 60), 'white')
    drawn = draw_boxes(image, [(10, 20, 50, 40), (0, 0, 80, 60)])
    assert image.getcolors() == [(80 * 60, (255, 255, 255))]
    assert drawn.size == image.size
    first, second = drawn.getpixel((30, 20)), drawn.getpixel((79, 59))
    assert (255, 255, 255) not in (first, second)
    assert first != second
    assert drawn.getpixel((49, 39)) == first  # right and bottom edges lie outside the last pixel
    assert drawn.getpixel((50, 40)) == drawn.getpixel((35, 30)) == (255, 255, 255)
    assert draw_boxes(image.convert('L'), [(5, 5, 5.2, 5.2)]).mode == 'RGB'
