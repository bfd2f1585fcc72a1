"""A sample that is fetched is what was planned; a picture that cannot be decoded is named, or blank and unlearned."""

import multiprocessing

import pytest
import torch
from PIL import Image

from tests.data.squares import BAD, GOOD, SEEN, lines_of
from vlmtune.structures import IGNORE_INDEX, SampleKey
from vlmtune.utils.errors import DataError


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
