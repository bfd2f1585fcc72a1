"""What an image becomes is counted from its size alone, and equals what the model demands of the real pixels."""

import json
import random

import pytest
import torch
from PIL import Image

from vlmtune.data import Processor
from vlmtune.families import FAMILIES
from vlmtune.models import load_model
from vlmtune.structures import ImageSize
from vlmtune.utils.errors import ConfigError, DataError

VISION = [name for name, family in FAMILIES.items() if family.has_vision]
THEIRS = [name for name in VISION if FAMILIES[name].model is None]  # those for which transformers has a processor
_RNG = random.Random(0)
SIZES = [
    *(ImageSize(h, w) for h, w in ((28, 28), (56, 56), (57, 55), (1, 1), (1, 150), (300, 20), (112, 113), (640, 480))),
    *(ImageSize(_RNG.randint(20, 700), _RNG.randint(20, 700)) for _ in range(26)),
]


def settings(name):
    return {'prompt_template': 'vicuna'} if name in ('llava', 'llava_next') else {}


def sizes_for(name):
    return [size for size in SIZES if min(size) > 1 or not name.startswith('qwen')]


def demanded(model, name, features):
    """Rows that the model puts in place of image tokens: it computes them from the pixels."""
    with torch.no_grad():
        output = model.model.get_image_features(**{key: features[key] for key in FAMILIES[name].image_inputs})
    if isinstance(output, torch.Tensor):  # of a family of ours
        return len(output)
    pooled = output.pooler_output
    return sum(part.shape[:-1].numel() for part in (pooled if isinstance(pooled, list | tuple) else [pooled]))


@pytest.fixture(scope='module')
def model(tiny_model):
    known = {}
    return lambda name: known.setdefault(name, load_model(str(tiny_model(name)), dtype=torch.float32)[0].eval())


@pytest.mark.parametrize('name', VISION)
def test_counts_are_what_the_model_demands(name, processor, model, talk, image_mark):
    mine = processor(name, **settings(name))
    sizes = sizes_for(name)
    assert len(sizes) >= 30
    for size in sizes:
        shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
        planned = int((mine.tokenize(shown, image_sizes=[size]).input_ids == mine.image_token_id).sum())
        features = mine.image_inputs([Image.new('RGB', (size.width, size.height), 'teal')])
        assert planned == demanded(model(name), name, features), size


def patches_of(features, mine):
    """Patches of the tensors that the vision encoder gets; tiles that only fill up the batch are zero throughout."""
    pixels = features['pixel_values']
    if pixels.ndim == 2:  # patches of any image one after the other
        return len(pixels)
    tiles = pixels.flatten(0, -4)
    patch = mine.config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    return int(tiles.flatten(1).any(dim=1).sum()) * (tiles.shape[-1] // patch) * (tiles.shape[-2] // patch)


@pytest.mark.parametrize('name', VISION)
def test_patches_are_what_the_vision_encoder_reads(name, processor, talk, image_mark):
    mine = processor(name, **settings(name))
    for pair in zip(sizes_for(name)[::2], sizes_for(name)[1::2], strict=False):
        shown = talk(('user', *[image_mark] * 2, 'What?'), ('assistant', 'x'))
        images = [Image.new('RGB', (size.width, size.height), 'teal') for size in pair]
        features = mine.image_inputs(images)
        if name == 'llava_onevision':  # the image processor cuts all images, the model reads the first tile of each
            features['pixel_values'] = features['pixel_values'][:, :1]
        assert mine.tokenize(shown, image_sizes=pair).patches == patches_of(features, mine), pair
        alone = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
        planned = mine.tokenize(alone, image_sizes=pair[:1]).patches
        assert planned == patches_of(mine.image_inputs(images[:1]), mine), pair


@pytest.mark.parametrize('name', [name for name in THEIRS if name != 'smolvlm'])  # whose processor cannot say it
def test_counts_are_what_transformers_plans_for_large_images(name, processor, their_processor, talk, image_mark):
    plan_is_theirs(processor(name, **settings(name)), their_processor, talk(('user', image_mark, 'What?')))


def plan_is_theirs(mine, their_processor, shown):
    """Without pixels: 200 sizes of 20 to 4000 pixels. Some processors count the marks around an image, some do not."""
    random_ = random.Random(1)
    sizes = [ImageSize(random_.randint(20, 4000), random_.randint(20, 4000)) for _ in range(200)]
    planned = their_processor(mine)._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])
    lengths = [len(mine.tokenize(shown, image_sizes=[size])) for size in sizes]
    around = {length - expected for length, expected in zip(lengths, planned['num_image_tokens'], strict=True)}
    assert len(around) == 1, around
    return lengths


@pytest.mark.parametrize(
    ('name', 'tile', 'joint', 'longest'),
    [
        ('llava_next', 336, {}, 2928),  # llava-v1.6: four tiles and the whole image, 24 x 24 patches each
        (
            'llava_onevision',
            384,
            {'num_image_tokens': 729},
            8700,
        ),  # up to 36 tiles of 27 x 27, scaled down to about nine
    ],
)
def test_the_tiles_of_real_checkpoints(
    name, tile, joint, longest, tiny_model, their_processor, talk, image_mark, tmp_path
):
    steps = range(1, 3 if name == 'llava_next' else 7)
    points = [[tile * i, tile * j] for i in steps for j in steps if i * j > 1]
    changes = {
        'config.json': {'image_grid_pinpoints': points},
        'preprocessor_config.json': {
            'image_grid_pinpoints': points,
            'size': {'shortest_edge': tile} if name == 'llava_next' else {'height': tile, 'width': tile},
        },
        'processor_config.json': joint,
    }
    for file in tiny_model(name).iterdir():
        if file.name in changes:
            content = json.loads(file.read_text()) | changes[file.name]
            (tmp_path / file.name).write_text(json.dumps(content))
        else:
            (tmp_path / file.name).symlink_to(file)
    lengths = plan_is_theirs(Processor(str(tmp_path)), their_processor, talk(('user', image_mark, 'What?')))
    assert 0.9 * longest < max(lengths) < longest + 50


@pytest.mark.parametrize('name', ['idefics3', 'smolvlm'])
@pytest.mark.parametrize(
    'setting', [{'size': {'longest_edge': 500}}, {'size': {'longest_edge': 57}}, {'do_resize': False}]
)
def test_tiles_where_the_longest_edge_is_no_multiple_of_one(name, setting, processor, talk, image_mark):
    """Where transformers' own ``get_number_of_image_patches`` counts too few: 56 x 100 at 500, tiles of 56."""
    mine = processor(name, image_processor=setting)
    shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
    for size in [ImageSize(100, 56), ImageSize(56, 100), ImageSize(101, 301), *SIZES]:
        pixels = mine.image_inputs([Image.new('RGB', (size.width, size.height))])['pixel_values']
        per_tile = mine.tokenize(shown, image_sizes=[size]).patches / pixels.shape[1]
        assert per_tile == (pixels.shape[-1] // mine.config.vision_config.patch_size) ** 2, size


def test_crops_beside_the_image(processor):
    with pytest.raises(ConfigError, match='do_pan_and_scan=True is not supported; set it to False'):
        processor('gemma3', image_processor={'do_pan_and_scan': True})


def test_resolutions_that_the_model_does_not_know(processor):
    with pytest.raises(ConfigError, match=r'image_grid_pinpoints=\[\[28, 28\]\] differ from those of the model, '):
        processor('llava_next', image_processor={'image_grid_pinpoints': [[28, 28]]}, **settings('llava_next'))


@pytest.mark.parametrize('name', THEIRS)
def test_the_expansion_is_that_of_transformers(name, processor, theirs, talk, image_mark):
    """Token for token, two images a time."""
    mine = processor(name, **settings(name))
    sizes = sizes_for(name)
    shown = talk(('user', image_mark, image_mark, 'What?'), ('assistant', 'x'))
    for pair in zip(sizes[::2], sizes[1::2], strict=False):
        assert mine.tokenize(shown, image_sizes=pair).input_ids.tolist() == theirs(mine, shown, list(pair)), pair


@pytest.mark.parametrize('name', [name for name in VISION if name not in ('llava', 'gemma3', 'paligemma')])
def test_sizes_matter(name, processor, talk, image_mark):
    mine = processor(name, **settings(name))
    shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
    assert len({len(mine.tokenize(shown, image_sizes=[size])) for size in sizes_for(name)}) > 2


@pytest.mark.parametrize('name', VISION)
def test_several_images_are_counted_each(name, processor, model, talk, image_mark):
    """Also together in one call of the image processor, which may pad them to one shape."""
    mine = processor(name, **settings(name))
    sizes = sizes_for(name)[4:9]
    shown = talk(('user', *[image_mark] * len(sizes), 'What?'), ('assistant', 'x'))
    planned = int((mine.tokenize(shown, image_sizes=sizes).input_ids == mine.image_token_id).sum())
    features = mine.image_inputs([Image.new('RGB', (size.width, size.height), 'teal') for size in sizes])
    assert planned == demanded(model(name), name, features)
    assert set(features) == set(FAMILIES[name].image_inputs)


@pytest.mark.parametrize(
    ('name', 'limit'),
    [
        ('qwen2_vl', {'max_pixels': 4 * 28 * 28}),
        ('qwen2_5_vl', {'max_pixels': 8 * 28 * 28, 'min_pixels': 6 * 28 * 28}),
        ('qwen3_vl', {'max_pixels': 6 * 32 * 32}),
        ('internvl', {'max_patches': 2}),
        ('internvl', {'crop_to_patches': False}),
        ('idefics3', {'size': {'longest_edge': 56}}),
        ('smolvlm', {'do_image_splitting': False}),
    ],
)
def test_a_changed_limit_reaches_count_and_pixels_alike(name, limit, processor, model, talk, image_mark):
    plain, mine = processor(name), processor(name, image_processor=limit)
    shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
    counts = []
    for size in sizes_for(name):
        counts.append(
            [int((p.tokenize(shown, image_sizes=[size]).input_ids == p.image_token_id).sum()) for p in (mine, plain)]
        )
        features = mine.image_inputs([Image.new('RGB', (size.width, size.height), 'teal')])
        assert counts[-1][0] == demanded(model(name), name, features), size
    assert max(changed for changed, _ in counts) < max(before for _, before in counts)


def test_llava_without_a_class_token_or_with_all_patches(tiny_model, tmp_path, talk, image_mark):
    """SigLIP has no class token; 'full' keeps it where there is one."""
    shown = talk(('user', image_mark, 'x'), ('assistant', 'y'))
    siglip = {'model_type': 'siglip_vision_model', 'image_size': 42, 'vision_use_head': False}
    for folder, overrides in (
        (tiny_model('llava', vision_config=siglip, vision_feature_select_strategy='full'), 9),
        (tiny_model('llava', vision_feature_select_strategy='full', image_seq_length=10), 10),
    ):
        bare = tmp_path / str(overrides)
        bare.mkdir()
        for file in folder.iterdir():
            if file.name != 'processor_config.json':  # older checkpoints have none: the model's config decides
                (bare / file.name).symlink_to(file)
        mine = Processor(str(bare), prompt_template='vicuna')
        tokens = mine.tokenize(shown, image_sizes=[ImageSize(60, 90)]).input_ids
        assert (tokens == mine.image_token_id).sum() == overrides
        model = load_model(str(bare), dtype=torch.float32)[0].eval()
        assert demanded(model, 'llava', mine.image_inputs([Image.new('RGB', (90, 60))])) == overrides


@pytest.mark.parametrize('name', ['qwen2_vl', 'qwen3_vl'])
def test_an_image_too_long_for_qwen(name, processor, talk, image_mark):
    shown = talk(('user', image_mark, 'What?'), ('assistant', 'x'))
    with pytest.raises(
        DataError, match='an image of 4100x20 pixels cannot be used: absolute aspect ratio must be smaller'
    ):
        processor(name).tokenize(shown, image_sizes=[ImageSize(20, 4100)])
