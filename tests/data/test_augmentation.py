"""Images are changed anew in every epoch, alike on every worker and after a resume, and never in size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from vlmtune.data import (
    MixedDataset,
    StreamingDataset,
    SupervisedDataset,
    build_train_loader,
    chat_template_map_fn,
    color_jitter,
    jpeg_compression,
    llava_map_fn,
    stream_rows,
)
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import ConfigError, DataError

JITTER = dict(type=color_jitter, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2)
SHOWN = dict(image=['0.png', '0.png'])


def row(number):
    turns = [('human', f'<image>\n<image>\nNumber {number}?'), ('gpt', 'A square.')]
    return {'conversations': [{'from': who, 'value': text} for who, text in turns], **SHOWN}


@pytest.fixture
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 40)).convert('RGB')


@pytest.fixture
def build(processor, picture, tmp_path):
    """``build(rows=4, image_transform=...)``; every row shows one picture twice."""
    picture.save(tmp_path / '0.png')

    def make(*, rows=4, of=SupervisedDataset, **settings):
        source = [row(number) for number in range(rows)]
        if of is StreamingDataset:
            path = tmp_path / 'rows.jsonl'
            path.write_text(''.join(json.dumps(line) + '\n' for line in source))
            source = dict(type=stream_rows, path=str(path))
        mine = processor('qwen2_vl')
        maps = dict(dataset_map_fn=llava_map_fn, template_map_fn=chat_template_map_fn)
        return of(source, processor=mine, image_folder=str(tmp_path), max_length=128, **maps, **settings)

    return make


def pixels(dataset, sample, *, epoch=0):
    """uint8[2, P, D]: both images of a sample."""
    both = dataset[SampleKey(epoch, sample)]['pixel_bytes']
    return both.view(2, -1, both.shape[-1])


# ---- what is drawn


def test_a_sample_looks_different_in_every_epoch_and_alike_when_it_is_asked_for_again(build):
    plain, jittered = build(), build(image_transform=JITTER)
    looks = {(epoch, i): pixels(jittered, i, epoch=epoch) for epoch in (0, 1) for i in (0, 1)}
    seen = [image for look in looks.values() for image in look] + [pixels(plain, 0)[0]]
    assert len({image.numpy().tobytes() for image in seen}) == 9, 'both images of both samples in both epochs, and none'
    for (epoch, i), look in reversed(looks.items()):
        assert torch.equal(pixels(jittered, i, epoch=epoch), look)
    again, other = build(image_transform=JITTER, seed=0), build(image_transform=JITTER, seed=1)
    assert torch.equal(pixels(again, 1, epoch=1), looks[1, 1])
    assert not torch.equal(pixels(other, 1, epoch=1), looks[1, 1])


def test_nothing_but_pixels_changes(build):
    plain, jittered = build(), build(image_transform=JITTER)
    before, after = plain[SampleKey(3, 2)], jittered[SampleKey(3, 2)]
    assert [name for name in before if not torch.equal(before[name], after[name])] == ['pixel_bytes']


def test_it_is_not_part_of_the_plan(build, tmp_path, caplog):
    for transform in (None, JITTER, dict(JITTER, hue=0.5)):
        build(image_transform=transform, cache_dir=str(tmp_path / 'plans'))
    assert len(list(Path(tmp_path / 'plans').glob('*.arrow'))) == 1
    assert 'the last one differs' not in caplog.text


def test_global_generators_are_left_alone(build):
    dataset = build(image_transform=JITTER)
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    dataset[0]
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def batches(dataset, *, rank=0, ranks=1, workers=0, epochs=(0, 1), **settings):
    """The pixels of every sample of a rank, by (epoch, sample); each micro-batch is one sample."""
    loader = build_train_loader(dataset, seed=5, rank=rank, world_size=ranks, num_workers=workers, **settings)
    seen = {}
    for epoch in epochs:
        loader.batch_sampler.start_epoch(epoch)
        keys = [key for (key,) in loader.batch_sampler]
        for key, batch in zip(keys, loader, strict=True):
            seen[epoch, key.sample] = batch['pixel_bytes']
    return seen


def test_workers_and_ranks_draw_alike(build):
    dataset = build(rows=6, image_transform=JITTER)
    alone = batches(dataset)
    assert len(alone) == 12
    shared = {}
    for rank, workers in ((0, 2), (1, 1)):
        shared |= batches(dataset, rank=rank, ranks=2, workers=workers)
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


# ---- mixtures and streams


def test_members_of_a_mixture_have_their_own(build, processor):
    settings = dict(processor=processor('qwen2_vl'), seed=3)
    members = [build(image_transform=JITTER, seed=3), build()]
    mixture = MixedDataset(members, **settings)
    assert torch.equal(pixels(mixture, 2, epoch=4), pixels(members[0], 2, epoch=4))
    assert torch.equal(pixels(mixture, 6, epoch=4), pixels(members[1], 2))


def test_a_mixture_hands_on_its_transform_and_its_seed(build, processor, tmp_path):
    member = dict(
        type=SupervisedDataset, rows=[row(0)], dataset_map_fn=dict(type=llava_map_fn), max_length=128,
        template_map_fn=dict(type=chat_template_map_fn), image_folder=str(tmp_path),
    )  # fmt: skip
    own = dict(member, image_transform=dict(type=jpeg_compression, quality=(1, 1)))
    mixture = MixedDataset([member, own], processor=processor('qwen2_vl'), image_transform=JITTER, seed=3)
    assert torch.equal(pixels(mixture, 0), pixels(build(image_transform=JITTER, seed=3), 0))
    assert torch.equal(pixels(mixture, 1), pixels(build(image_transform=own['image_transform']), 0))


def test_a_stream_counts_its_passes_as_epochs(build):
    dataset = build(of=StreamingDataset, image_transform=JITTER, seed=5, shuffle_window=3)
    loader = build_train_loader(dataset, seed=5)
    steps = iter(loader.batch_sampler)
    keys = [next(steps)[0] for _ in range(8)]
    planned = build(image_transform=JITTER, seed=5)
    assert sorted((key.epoch, key.sample.row) for key in keys) == [(epoch, i) for epoch in (0, 1) for i in range(4)]
    for key in keys:
        expected = planned[SampleKey(key.epoch, key.sample.row)]['pixel_bytes']
        assert torch.equal(dataset[key]['pixel_bytes'], expected)


# ---- mistakes


def turn_when_large(image, rng):
    return image.transpose(Image.Transpose.ROTATE_90) if image.width == 60 else image


@pytest.mark.parametrize('kind', [SupervisedDataset, StreamingDataset])
def test_another_size_stops_the_run_whatever_becomes_of_bad_samples(kind, build):
    dataset = build(of=kind, image_transform=turn_when_large, on_bad_sample='skip')
    key = SampleKey(0, 0) if kind is SupervisedDataset else dataset.plan(list(dataset.stream.read()))[0]
    message = (
        r'turn_when_large made 40 x 60 pixels \(RGB\) of 60 x 40 pixels \(RGB\); expected an RGB image of the same'
    )
    with pytest.raises(DataError, match=message):
        dataset[key]


@pytest.mark.parametrize(
    ('transform', 'error', 'message'),
    [
        (lambda image, rng: image.resize((224, 224)), DataError, 'made 224 x 224 pixels'),
        (lambda image, rng: image.convert('L'), DataError, r'made 48 x 32 pixels \(L\)'),
        (lambda image, rng: np.asarray(image), DataError, 'made ndarray of 48 x 32'),
        (dict(JITTER, hue=0.6), ConfigError, r'color_jitter: hue=0.6; expected 0 to 0.5'),
        (dict(JITTER, contrast=-0.1), ConfigError, r'color_jitter: contrast=-0.1; expected 0 to 1'),
        (
            dict(type=jpeg_compression, quality=(90, 30)),
            ConfigError,
            r'quality=\(90, 30\); expected \(lowest, highest\)',
        ),
        (dict(brightness=0.1), TypeError, 'type='),
    ],
)
def test_mistakes_are_found_before_anything_is_planned(transform, error, message, build):
    with pytest.raises(error, match=message):
        build(image_transform=transform)


def test_a_broken_picture_stays_blank(build, picture, tmp_path):
    dataset = build(image_transform=lambda image, rng: ImageChops.invert(image), on_bad_sample='skip')
    whole = (tmp_path / '0.png').read_bytes()
    (tmp_path / '0.png').write_bytes(whole[:80])
    assert pixels(dataset, 0).sum() == 0


# ---- the transforms


def test_color_jitter_stays_within_its_settings(picture):
    """Of grey 100, brightness of 0.3 makes 70 to 130; colours without saturation stay grey."""
    grey = Image.new('RGB', (2, 2), (100, 100, 100))
    rng = np.random.default_rng(0)
    levels = [color_jitter(grey, rng, brightness=0.3).getpixel((0, 0)) for _ in range(300)]
    values = [red for red, _, _ in levels]
    assert all(red == green == blue for red, green, blue in levels)
    assert 69 <= min(values) <= 74
    assert 126 <= max(values) <= 131
    assert color_jitter(picture, rng).tobytes() == picture.tobytes(), 'nothing is asked for'
    assert color_jitter(grey, rng, saturation=1.0, hue=0.5).tobytes() == grey.tobytes()


def test_hue_turns_colours():
    red = Image.new('RGB', (2, 2), (255, 0, 0))
    seen = {color_jitter(red, np.random.default_rng(i), hue=0.5).getpixel((0, 0)) for i in range(50)}
    assert len(seen) > 20
    assert all(max(colour) == 255 and min(colour) == 0 for colour in seen)


def test_jpeg_compression_is_that_of_a_file(picture, tmp_path):
    picture.save(tmp_path / 'x.jpg', quality=30)
    expected = Image.open(tmp_path / 'x.jpg').convert('RGB')
    assert jpeg_compression(picture, np.random.default_rng(0), quality=(30, 30)).tobytes() == expected.tobytes()
    assert len({jpeg_compression(picture, np.random.default_rng(i)).tobytes() for i in range(20)}) > 10


def test_several_run_one_after_the_other(picture, build):
    order = []
    steps = [lambda image, rng, name=name: (order.append((name, rng.random())), image)[1] for name in 'ab']
    dataset = build(image_transform=steps)
    order.clear()
    dataset[0]
    assert [name for name, _ in order] == ['a', 'b', 'a', 'b']
    assert len({number for _, number in order}) == 4, 'one generator for an image, another for the next'
