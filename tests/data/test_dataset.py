"""Rows become samples before the first step; what cannot be used is named, dropped or skipped, as the settings say."""

import json
import multiprocessing
from dataclasses import replace
from functools import partial

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
        if rows:
            path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        mine = processor(model, prompt_template='vicuna' if model == 'llava' else None)
        defaults = dict(
            rows=dict(type=load_rows, path=str(path)),
            dataset_map_fn=dict(type=llava_map_fn),
            template_map_fn=dict(type=chat_template_map_fn),
        )
        return SupervisedDataset(processor=mine, image_folder=str(images), **{**defaults, **settings})

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
    assert (len(dataset), len(dataset.overlong_samples)) == (2, 1)
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
    assert (dataset.truncated, dataset.overlong_samples) == (1, [])
    text = dataset.processor.tokenizer.decode(sample.input_ids)
    assert text.endswith('ASSISTANT: A square.</s>')
    assert 'Hello' in text
    shorter = build(LONG, max_length=20, overlong='truncate_turns').samples[0]
    assert shorter.images == ()
    assert dataset.processor.tokenizer.decode(shorter.input_ids).endswith('Hello</s>')


def test_a_first_turn_that_is_too_long_is_dropped_whole(build):
    dataset = build(GOOD, row('x ' * 200, 'y', 'z', 'w'), max_length=64, overlong='truncate_turns')
    assert (len(dataset), len(dataset.overlong_samples)) == (1, 1)


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
    assert build(whole, row('Hi', 'Hello', 'And?', 'no')).overlong_samples[0].kind == 'overlong'


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
        (
            dict(overlong='truncate'),
            "overlong='truncate' is unknown; expected one of drop, truncate_turns, split, error",
        ),
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


@pytest.mark.parametrize('broken', ['{"conversations": [', '[1, 2]', '"text"', '{"a": "\\ud8"}'])
def test_a_broken_line_is_a_bad_row(broken, build, tmp_path):
    build(GOOD)  # writes the file
    path = tmp_path / 'train.jsonl'
    path.write_text('\n'.join([json.dumps(GOOD), '', broken, json.dumps(GOOD)]))
    again = partial(build, rows=dict(type=load_rows, path=str(path)))
    with pytest.raises(DataError, match=r'^sample 1 \(train.jsonl:3\): (?!.*train.jsonl)'):
        again()
    dataset = again(on_bad_sample='skip', bad_sample_budget=0.5)
    assert len(dataset) == 2
    assert [(bad.index, bad.where, bad.error) for bad in dataset.bad_samples] == [
        (1, 'train.jsonl:3', 'unreadable_row')
    ]
    assert [dataset.row_of(i) for i in range(2)] == [0, 2]
    assert dataset.where(1) == 'train.jsonl:4'


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_could_not_be_used_is_written_down(build, tmp_path):
    path = tmp_path / 'new' / 'bad_samples.jsonl'
    settings = dict(on_bad_sample='skip', max_length=64, bad_samples_file=str(path))
    build(GOOD, LONG, BAD, GOOD, row('What?'), bad_sample_budget=0.4, **settings)
    long, missing, empty = lines_of(path)
    assert (long['index'], long['where'], long['kind']) == (1, 'train.jsonl:2', 'overlong')
    assert long['images'] == ['0.png', '1.png']
    assert long['reason'].endswith('tokens, max_length is 64')
    assert (missing['index'], missing['kind'], missing['error']) == (2, 'bad', 'missing_image')
    assert missing['images'] == ['gone.png']
    assert (empty['index'], empty['kind'], empty['images']) == (4, 'bad', [])
    with pytest.raises(DataError, match='more than bad_sample_budget'):
        build(GOOD, BAD, **settings)
    assert [line['index'] for line in lines_of(path)] == [1], 'written before the run stops'
    build(GOOD, **settings)
    assert path.read_text() == '', 'fresh'


def test_processes_make_no_difference(processor, tmp_path):
    """The same table, byte for byte, and the same list of bad rows."""
    rows = [row(f'What is {i}?', f'It is {i * i}.') if i % 100 else row('What?') for i in range(1300)]

    def build(workers):
        return SupervisedDataset(
            rows,
            processor=processor('qwen2'),
            dataset_map_fn=llava_map_fn,
            template_map_fn=chat_template_map_fn,
            on_bad_sample='skip',
            planning_workers=workers,
        )

    serial, parallel = build(0), build(3)
    assert serial.samples.content.equals(parallel.samples.content)
    assert serial.bad_samples == parallel.bad_samples
    assert [bad.index for bad in serial.bad_samples] == list(range(0, 1300, 100))
    assert parallel.lengths.tolist() == [len(sample) for sample in parallel.samples]
    with pytest.raises(DataError, match=r'sample 0 \(rows\[0\]\): has no answer'):
        SupervisedDataset(
            rows,
            processor=processor('qwen2'),
            dataset_map_fn=llava_map_fn,
            template_map_fn=chat_template_map_fn,
            planning_workers=3,
        )


def test_a_mistake_in_a_users_function_names_the_row(processor):
    def fail(value):
        return {}[value['id']]

    with pytest.raises(KeyError) as error:
        SupervisedDataset(
            [dict(id=3)], processor=processor('qwen2'), dataset_map_fn=fail, template_map_fn=chat_template_map_fn
        )
    assert error.value.__notes__ == ['while planning sample 0 (rows[0])']


def shifted(conversation, *, processor, image_sizes):
    sample = chat_template_map_fn(conversation, processor=processor, image_sizes=image_sizes)
    return replace(sample, labels=np.roll(sample.labels, -1))


def test_labels_that_a_table_cannot_hold(build):
    with pytest.raises(ConfigError, match='labels must be the tokens themselves'):
        build(GOOD, template_map_fn=shifted)


def test_counts_of_every_sample(build):
    dataset = build(GOOD, SEEN, model='qwen2_vl')
    learned = [int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in dataset.samples]
    assert dataset.supervised.tolist() == learned
    assert dataset.patches.tolist() == [sample.patches for sample in dataset.samples] == [0, dataset.patches[1]]
    assert dataset.patches[1] > 0
    assert dataset.epoch_samples(seed=1, epoch=2).tolist() == [0, 1]


# ---- fetching


def test_a_fetched_sample(build):
    dataset = build(SEEN)
    item = dataset[SampleKey(0, 0)]
    assert {name: (tensor.dtype, tensor.ndim) for name, tensor in item.items()} == {
        'input_ids': (torch.long, 1),
        'labels': (torch.long, 1),
        'position_ids': (torch.long, 1),
        'pixel_bytes': (torch.uint8, 4),
        'pixel_affine': (torch.float32, 2),
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
    assert 'pixel_bytes' in item


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
    assert item['pixel_bytes'].shape == whole['pixel_bytes'].shape
    assert set(item['labels'].tolist()) == {IGNORE_INDEX}
    assert 'sample 1 (train.jsonl:2): image cannot be read' in caplog.text
    assert 'nothing of it is learned' in caplog.text


def test_a_picture_that_is_broken_behind_its_header_is_written_down_once(build, images, tmp_path):
    path = tmp_path / 'bad_samples.jsonl'
    data = (images / '0.png').read_bytes()
    (images / '0.png').write_bytes(data[:60])
    dataset = build(BAD, SEEN, on_bad_sample='skip', bad_sample_budget=0.5, bad_samples_file=str(path))
    for _ in range(2):
        dataset[0]
    missing, broken = lines_of(path)
    assert missing['index'] == 0
    assert (broken['index'], broken['where'], broken['kind']) == (1, 'train.jsonl:2', 'undecodable')
    assert broken['images'] == ['0.png']


def test_ranks_write_to_one_file(build, images, tmp_path):
    """Four processes with a data set each: what all met while planning and while training is there once."""
    path = tmp_path / 'bad_samples.jsonl'
    data = (images / '0.png').read_bytes()
    (images / '0.png').write_bytes(data[:60])
    rows = [BAD, *[SEEN] * 100]
    context = multiprocessing.get_context('fork')
    together = context.Barrier(4)

    def learn():
        dataset = build(on_bad_sample='skip', bad_sample_budget=0.5, bad_samples_file=str(path))
        for index in range(len(dataset)):
            together.wait(60)  # so that all meet a picture at the same time
            dataset[index]

    build(*rows, on_bad_sample='skip', bad_sample_budget=0.5)
    ranks = [context.Process(target=learn) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert sorted(line['index'] for line in lines_of(path)) == list(range(101))
    assert [entry.name for entry in tmp_path.glob('bad_samples*')] == [path.name], 'nothing is left beside it'


def test_a_picture_that_changed_its_size(build, images):
    dataset = build(SEEN, model='qwen2_vl')
    Image.new('RGB', (200, 300)).save(images / '0.png')
    with pytest.raises(
        DataError, match=r'sample 0 .*: image 0.png has 200 x 300 pixels, but had 60 x 90 when the run started'
    ):
        dataset[0]
