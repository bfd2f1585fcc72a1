"""The pixels are those of the image processors, for images of every shape; unknown settings are left to those."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.data import Processor
from vlmtune.data.pixels import TOLERANCE
from vlmtune.families import FAMILIES

FAST = [name for name, family in FAMILIES.items() if family.pixels]
SETTINGS = {
    'qwen2_vl': [
        {},
        {'min_pixels': 56 * 56, 'max_pixels': 100 * 28 * 28},
        {'patch_size': 14, 'rescale_factor': 1 / 128},
    ],
    'qwen2_5_vl': [{'max_pixels': 30 * 28 * 28, 'resample': 2}],
    'qwen3_vl': [{}, {'image_mean': [0.1, 0.5, 0.9], 'image_std': [0.2, 0.3, 0.4]}],
    'qwen3_vl_moe': [{}],
    'llava': [
        {},
        {'size': {'height': 50, 'width': 34}, 'do_center_crop': False},
        {'size': {'height': 50, 'width': 34}, 'crop_size': {'height': 31, 'width': 42}},
        {'size': {'shortest_edge': 29}, 'crop_size': {'height': 42, 'width': 33}, 'resample': 1},  # black at the edges
    ],
    'internvl': [{}, {'max_patches': 12}, {'min_patches': 3}, {'max_patches': 1}],
}
CASES = [(name, settings) for name in FAST for settings in SETTINGS.get(name, [{}])]
ODD_SIZES = [(1, 1), (1, 150), (150, 1), (7, 7), (42, 42), (56, 56), (28, 56), (112, 56)]  # (height, width)


def noise(height, width):
    random = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def images():
    random = np.random.default_rng(0)
    sizes = [*ODD_SIZES, *(tuple(random.integers(8, 200, 2).tolist()) for _ in range(40))]
    return [noise(*size) for size in sizes]


def test_every_family_with_a_function_is_compared():
    assert set(SETTINGS) <= set(FAST)
    assert {name for name, _ in CASES} == set(FAST)
    assert len(CASES) >= 16


@pytest.mark.parametrize(('name', 'settings'), CASES)
def test_pixels_are_those_of_the_image_processor(processor, name, settings):
    """Within 1e-5: the processors round to float32 three times, the function twice; a wrong byte would be 4e-3."""
    mine = processor(name, image_processor=settings)
    some = images()
    theirs = mine.image_processor(some, return_tensors='pt')
    found = mine.image_inputs(some)
    assert list(found) == list(FAMILIES[name].image_inputs)
    for key, value in found.items():
        assert value.dtype == theirs[key].dtype
        assert value.is_contiguous()
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=TOLERANCE)
    if 'image_grid_thw' in found:
        assert found['image_grid_thw'].equal(theirs['image_grid_thw'])


@pytest.mark.parametrize(('name', 'settings'), CASES)
def test_the_image_processor_is_not_called(processor, monkeypatch, name, settings):
    mine = processor(name, image_processor=settings)
    monkeypatch.setattr(type(mine.image_processor), '_preprocess', None)
    assert mine.image_inputs([noise(60, 90)])['pixel_values'].isfinite().all()


@pytest.mark.parametrize(
    ('name', 'settings', 'reason'),
    [
        ('llava', {'do_resize': False, 'do_center_crop': True}, 'do_resize is off'),
        ('llava', {'do_normalize': False}, 'do_normalize is off'),
        ('llava', {'do_pad': True, 'pad_size': {'height': 50, 'width': 50}}, 'do_pad is on'),
        ('llava', {'size': {'shortest_edge': 42, 'longest_edge': 60}}, 'size='),
        ('qwen2_vl', {'do_rescale': False}, 'do_rescale is off'),
    ],
)
def test_other_settings_are_left_to_the_image_processor(tiny_model, caplog, name, settings, reason):
    with caplog.at_level(logging.INFO):
        mine = Processor(str(tiny_model(name)), image_processor=settings)
    assert reason in caplog.text
    some = [noise(60, 90)]
    assert mine.image_inputs(some)['pixel_values'].equal(
        mine.image_processor(some, return_tensors='pt')['pixel_values']
    )


def test_a_function_that_makes_other_pixels_is_not_used(tiny_model, caplog, monkeypatch):
    """As after a change in transformers."""
    monkeypatch.setattr('vlmtune.data.pixels.pixel_affine', lambda _: torch.tensor([[1.0] * 3, [0.0] * 3]))
    with caplog.at_level(logging.INFO):
        mine = Processor(str(tiny_model('llava')))
    assert 'pixel_values would differ by' in caplog.text
    some = [noise(60, 90)]
    assert mine.image_inputs(some)['pixel_values'].equal(
        mine.image_processor(some, return_tensors='pt')['pixel_values']
    )
