"""Rows become samples before the first step; what is too long is dropped or cut, as the settings say."""

from dataclasses import replace

import numpy as np
import pytest

from tests.data.squares import GOOD, LONG, SEEN, row
from vlmtune.data import SupervisedDataset, chat_template_map_fn, llava_map_fn
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError, DataError

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
