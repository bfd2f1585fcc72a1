"""How MiniCPM-V 2.0 cuts images, against what its own code does: goldens/make_minicpmv.py says how that was asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vlmtune.data import Processor
from vlmtune.data.slices import SliceImageProcessor, plan_slices
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart

GOLDEN = Path(__file__).resolve().parents[1] / 'goldens' / 'minicpmv.safetensors'


def image_of(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def processor(tiny_model) -> Processor:
    return Processor(str(tiny_model('minicpmv2')))


def test_images_of_every_shape_are_cut_as_the_official_code_cuts_them():
    with safe_open(GOLDEN, 'pt') as file:
        plans = file.get_tensor('plans').tolist()
    assert len(plans) == 2000
    for width, height, most, side, *official in plans:
        plan = plan_slices(ImageSize(height, width), most=most, side=side, patch=14)
        made = [plan.whole.width, plan.whole.height, plan.columns, plan.rows, plan.slice.width, plan.slice.height]
        assert made == official, (width, height, most, side)


@pytest.mark.parametrize(
    ('size', 'columns', 'rows'),
    [((448, 448), 0, 0), ((449, 448), 2, 1), ((1344, 1344), 3, 3), ((4000, 400), 9, 1), ((300, 3000), 1, 6)],
)
def test_a_large_image_has_up_to_nine_slices(size: tuple[int, int], columns: int, rows: int):
    plan = plan_slices(ImageSize(size[1], size[0]), most=9, side=448, patch=14)
    assert (plan.columns, plan.rows) == (columns, rows)


@pytest.mark.parametrize('size', [(30, 20), (200, 110), (70, 190), (56, 57), (3, 400)])
@pytest.mark.parametrize('most', [1, 4])
def test_tokens_and_patches_are_counted_before_pixels_are_seen(processor: Processor, size: tuple[int, int], most: int):
    chosen = Processor(processor.source, image_processor=dict(max_slice_nums=most))
    image = image_of(*size)
    question = Message('user', (ImagePart(0), TextPart('What?')))
    talk = Conversation((question, Message('assistant', (TextPart('A square.'),))), (ImageRef(path='x'),))
    sample = chosen.tokenize(talk, image_sizes=[ImageSize(image.height, image.width)])
    inputs = chosen.image_inputs([image])
    views = len(inputs['patch_grids'])
    assert (sample.input_ids == chosen.image_token_id).sum() == views * chosen.config.query_num
    assert sample.patches == len(inputs['pixel_values']) == inputs['patch_grids'].prod(dim=1).sum()
    assert views in ((1,) if most == 1 else (1, 3, 4, 5))
    marks = [chosen.tokenizer.convert_tokens_to_ids(mark) for mark in ('<image>', '</image>', '<slice>', '</slice>')]
    counts = [int((sample.input_ids == mark).sum()) for mark in marks]
    assert counts == [views, views, *[int(views > 1)] * 2]


def test_the_image_processor_and_the_fast_way_agree_and_its_settings_survive(tmp_path: Path):
    made = SliceImageProcessor(max_slice_nums=3, scale_resolution=56, image_mean=[0.1, 0.2, 0.3])
    made.save_pretrained(tmp_path)
    again = SliceImageProcessor.from_pretrained(tmp_path)
    assert (again.max_slice_nums, again.scale_resolution, again.patch_size) == (3, 56, 14)
    assert SliceImageProcessor(patch_size=28).patch_size == 28
    images = [image_of(120, 60), image_of(20, 30).convert('L')]
    features = again(images, return_tensors='pt')
    assert features['pixel_values'].shape == (int(features['patch_grids'].prod(dim=1).sum()), 588)
    grey = np.asarray(images[1].convert('RGB').resize((42, 70), Image.Resampling.BICUBIC)) / 255
    first = torch.tensor((grey[:14, :14].transpose(2, 0, 1) - np.array([[[0.1]], [[0.2]], [[0.3]]])) / 0.5).flatten()
    assert features['patch_grids'].tolist()[-1] == [5, 3]
    torch.testing.assert_close(features['pixel_values'][-15], first.float(), atol=1e-6, rtol=0)
    assert torch.equal(again(images[0], return_tensors='pt')['pixel_values'], features['pixel_values'][:-15])
    with pytest.raises(TypeError, match="'do_resize'] belong to the image processor"):
        again(images, do_resize=False)


def test_pixels_travel_as_bytes(processor: Processor):
    made = processor.image_bytes([image_of(120, 60)])
    assert made['pixel_bytes'].dtype == torch.uint8
    assert set(made) == {'pixel_bytes', 'pixel_affine', 'patch_grids'}
