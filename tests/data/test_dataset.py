"""Rows become samples before the first step; what cannot be used is named, dropped or skipped, as the settings say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.data import SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.structures import IGNORE_INDEX, SampleKey
from vlmtune.utils.errors import ConfigError, DataError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, size in enumerate([(60, 90), (100, 40), (28, 28)]):
        Image.new('RGB', size, (50 * i, 100, 200)).save(folder / f'{i}.png')
    return folder


@pytest.fixture
def build(processor, images, tmp_path):
    """``build(row, row, ...)``: a data set over a .jsonl file of these rows."""

    def run(*rows, model='llava', **settings):
        path = tmp_path / 'train.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        mine = processor(model, prompt_template='vicuna' if model == 'llava' else None)
        return SupervisedDataset(
            dict(type=load_rows, path=str(path)),
            processor=mine,
            dataset_map_fn=dict(type=llava_map_fn),
            template_map_fn=dict(type=chat_template_map_fn),
            image_folder=str(images),
            **settings,
        )

    return run


def row(*texts, image=None):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]
    return {'conversations': turns} | ({} if image is None else {'image': image})


GOOD = row('What is it?', 'A square.')
SEEN = row('<image>\nWhat is it?', 'A square.', image='0.png')
LONG = row('Hi', 'Hello', '<image>\nWhat is it?', 'A square.', '<image>Again?', 'no ' * 200, image=['0.png', '1.png'])


# ---- planning


def test_planning_reads_headers_only(build, images):
    """A picture cut off behind its header is planned; its pixels are missed only when they are wanted."""
    data = (images / '0.png').read_bytes()
    (images / '0.png').write_bytes(data[:60])
    dataset = build(SEEN)
    assert (dataset.samples[0].input_ids == dataset.processor.image_token_id).sum() == 9


def test_lengths_are_those_of_the_samples(build):
    dataset = build(GOOD, SEEN)
    assert dataset.lengths.dtype == np.int64
    assert dataset.lengths.tolist() == [len(dataset[0]['input_ids']), len(dataset[1]['input_ids'])]
    assert len(dataset) == 2


def test_long_samples_are_dropped_and_counted(build, caplog):
    dataset = build(GOOD, LONG, GOOD, max_length=64)
    assert (len(dataset), dataset.dropped) == (2, 1)
    assert '1 of 3 samples are longer than 64 tokens and were dropped' in caplog.text


def test_long_samples_as_an_error(build):
    with pytest.raises(DataError, match=r'sample 1 \(train.jsonl:2\): has \d+ tokens, max_length is 64'):
        build(GOOD, LONG, max_length=64, overlong='error')


def test_long_samples_lose_their_last_turns_and_the_images_in_them(build):
    dataset = build(LONG, max_length=64, overlong='truncate_turns')
    sample = dataset.samples[0]
    assert len(sample) <= 64
    assert [str(image) for image in sample.images] == ['0.png']
    assert len(sample.image_sizes) == 1
    text = dataset.processor.tokenizer.decode(sample.input_ids)
    assert text.endswith('ASSISTANT: A square.</s>')
    assert 'Hello' in text
    shorter = build(LONG, max_length=20, overlong='truncate_turns').samples[0]
    assert shorter.images == ()
    assert dataset.processor.tokenizer.decode(shorter.input_ids).endswith('Hello</s>')


def test_a_first_turn_that_is_too_long_is_dropped_whole(build):
    dataset = build(GOOD, row('x ' * 200, 'y', 'z', 'w'), max_length=64, overlong='truncate_turns')
    assert (len(dataset), dataset.dropped) == (1, 1)


def test_turns_are_not_cut_down_to_what_is_not_learned(processor, images):
    """The one learned answer is too long: the row is too long, not bad."""
    whole = row('Hi', 'Hello', 'And?', 'no ' * 200)

    def last_only(value):
        conversation = llava_map_fn(value)
        first = conversation.messages[1].__class__('assistant', conversation.messages[1].parts, loss=False)
        return conversation.__class__((conversation.messages[0], first, *conversation.messages[2:]))

    def build(*rows):
        return SupervisedDataset(
            rows,
            processor=processor('qwen2'),
            dataset_map_fn=last_only,
            template_map_fn=chat_template_map_fn,
            max_length=64,
            overlong='truncate_turns',
        )

    with pytest.raises(DataError, match=r'none of 1 rows can be used \(1 are longer than 64 tokens\)'):
        build(whole)
    assert build(whole, row('Hi', 'Hello', 'And?', 'no')).dropped == 1


# ---- bad rows


BAD = row('<image>\nWhat?', 'x', image='gone.png')


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (BAD, r'sample 1 \(train.jsonl:2\): image not found: .*gone.png'),
        (row('<image>\nWhat?', 'x', image='../x.png'), r'sample 1 \(train.jsonl:2\): image outside the image folder'),
        (row('<image>\nWhat?', 'x'), r'sample 1 \(train.jsonl:2\): has 1 <image> mark but 0 images'),
        (row('What?'), r'sample 1 \(train.jsonl:2\): has no answer'),
        ({'text': 'x'}, r'sample 1 \(train.jsonl:2\): .*conversations'),
    ],
)
def test_the_first_bad_row_stops_and_is_named(bad, message, build):
    with pytest.raises(DataError, match=message):
        build(GOOD, bad)


def test_bad_rows_are_skipped_within_a_budget(build, caplog):
    dataset = build(GOOD, BAD, GOOD, GOOD, on_bad_sample='skip', bad_sample_budget=0.25)
    assert len(dataset) == 3
    assert [(bad.index, bad.where) for bad in dataset.bad_samples] == [(1, 'train.jsonl:2')]
    assert 'gone.png' in dataset.bad_samples[0].reason
    assert '1 of 4 samples are bad and were skipped' in caplog.text
    with pytest.raises(
        DataError, match=r'2 of 4 samples are bad, more than bad_sample_budget=0.25; the first is sample 1'
    ):
        build(GOOD, BAD, BAD, GOOD, on_bad_sample='skip', bad_sample_budget=0.25)
    with pytest.raises(DataError, match=r'more than bad_sample_budget=0.01'):
        build(GOOD, BAD, on_bad_sample='skip')


def test_nothing_left(build):
    with pytest.raises(DataError, match='none of 1 rows can be used'):
        build(BAD, on_bad_sample='skip', bad_sample_budget=1.0)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(overlong='truncate'), "overlong='truncate' is unknown; expected one of drop, truncate_turns, error"),
        (dict(on_bad_sample='ignore'), "on_bad_sample='ignore' is unknown; expected one of error, skip"),
    ],
)
def test_unknown_words(settings, message, build):
    with pytest.raises(ConfigError, match=message):
        build(GOOD, **settings)


def test_an_image_folder_that_is_not_there(build, images, tmp_path):
    images.rename(tmp_path / 'elsewhere')
    with pytest.raises(DataError, match=r'image_folder .*images does not exist'):
        build(GOOD)


# ---- fetching


def test_a_fetched_sample(build):
    dataset = build(SEEN)
    item = dataset[SampleKey(0, 0)]
    assert {name: (tensor.dtype, tensor.ndim) for name, tensor in item.items()} == {
        'input_ids': (torch.long, 1),
        'labels': (torch.long, 1),
        'position_ids': (torch.long, 1),
        'pixel_values': (torch.float32, 4),
    }
    assert item['position_ids'].tolist() == list(range(len(dataset.samples[0])))
    assert (item['labels'] != IGNORE_INDEX).sum() > 2


def test_four_axes_for_three_axis_families(build):
    item = build(SEEN, model='qwen2_vl')[0]
    assert item['position_ids'].shape == (4, len(item['input_ids']))
    assert item['position_ids'][0].tolist() == list(range(len(item['input_ids'])))
    assert not torch.equal(item['position_ids'][2], item['position_ids'][3])


def test_a_filler_has_no_labels(build):
    item = build(SEEN)[SampleKey(0, 0, supervised=False)]
    assert set(item['labels'].tolist()) == {IGNORE_INDEX}
    assert 'pixel_values' in item


def test_a_picture_that_is_broken_behind_its_header_is_named(build, images):
    data = (images / '0.png').read_bytes()
    (images / '0.png').write_bytes(data[:60])
    with pytest.raises(DataError, match=r'sample 1 \(train.jsonl:2\): image cannot be read: .*0.png'):
        build(GOOD, SEEN)[1]


def test_a_picture_that_is_broken_behind_its_header_is_blank_and_unlearned(build, images, caplog):
    """The plan stands: no other sample takes its place, and a resumed run sees the same."""
    whole = build(GOOD, SEEN, on_bad_sample='skip')[1]
    data = (images / '0.png').read_bytes()
    (images / '0.png').write_bytes(data[:60])
    item = build(GOOD, SEEN, on_bad_sample='skip')[1]
    assert torch.equal(item['input_ids'], whole['input_ids'])
    assert item['pixel_values'].shape == whole['pixel_values'].shape
    assert set(item['labels'].tolist()) == {IGNORE_INDEX}
    assert 'sample 1 (train.jsonl:2): image cannot be read' in caplog.text
    assert 'nothing of it is learned' in caplog.text


def test_a_picture_that_changed_its_size(build, images):
    dataset = build(SEEN, model='qwen2_vl')
    Image.new('RGB', (200, 300)).save(images / '0.png')
    with pytest.raises(
        DataError, match=r'sample 0 .*: image 0.png has 200 x 300 pixels, but had 60 x 90 when the run started'
    ):
        dataset[0]
