"""``overlong='split'``: long plain texts become several samples, nothing else does."""

import numpy as np
import pytest
import torch

from vlmtune.data import (
    SupervisedDataset,
    build_train_loader,
    chat_template_map_fn,
    llava_map_fn,
    plain_text_map_fn,
    text_map_fn,
)
from vlmtune.structures import Sample


@pytest.fixture
def build(processor):
    def dataset(*words, map_fn=text_map_fn, template=plain_text_map_fn, rows=None, **settings):
        rows = rows or [{'text': ' '.join(f'w{i}' for i in range(count))} for count in words]
        settings = {'max_length': 32, 'overlong': 'split', **settings}
        return SupervisedDataset(
            rows, processor=processor('llama'), dataset_map_fn=map_fn, template_map_fn=template, **settings
        )

    return dataset


def test_the_pieces_are_the_text(build):
    whole = build(200, overlong='error', max_length=10_000).samples[0]
    dataset = build(200)
    assert len(whole) > 4 * 32
    assert dataset.lengths.tolist()[:-1] == [32] * (len(dataset) - 1)
    joined = np.concatenate([sample.input_ids for sample in dataset.samples])
    assert joined.tolist() == whole.input_ids.tolist()
    assert joined[-1] == dataset.processor.tokenizer.eos_token_id


def test_numbers_and_places(build):
    dataset = build(3, 100, 5)
    assert [len(sample) for sample in dataset.samples] == dataset.lengths.tolist()
    assert [int((s.labels[1:] != -100).sum()) for s in dataset.samples] == dataset.supervised.tolist()
    rows = [dataset.row_of(i) for i in range(len(dataset))]
    assert rows[0] == 0
    assert set(rows[1:-1]) == {1}
    assert rows[-1] == 2
    assert len(rows) > 4
    assert dataset.where(1) == dataset.where(2) == 'rows[1]'
    assert dataset.patches.tolist() == [0] * len(dataset)
    assert (dataset.truncated, dataset.overlong_samples) == (0, [])


@pytest.mark.parametrize(('extra', 'lengths'), [(0, [32]), (1, [32]), (2, [32, 2]), (33, [32, 32]), (34, [32, 32, 2])])
def test_a_last_piece_of_one_token_is_left_out(extra, lengths, build):
    """It would have nothing to predict."""

    def of_length(conversation, *, processor, image_sizes):
        ids = np.arange(32 + extra, dtype=np.int32)
        return Sample(ids, ids.copy())

    assert build(1, template=of_length).lengths.tolist() == lengths


def test_all_of_it_is_trained_on(build):
    dataset = build(100, 7, 300)
    batches = list(build_train_loader(dataset, seed=0, pack_to_max_length=True))
    assert sum(batch['input_ids'].numel() for batch in batches) == dataset.lengths.sum()
    assert torch.equal(dataset[0]['labels'], dataset[0]['input_ids'])


def test_chats_are_not_cut(build):
    talk = [{'from': 'human', 'value': 'x ' * 100}, {'from': 'gpt', 'value': 'y'}]
    short = [{'from': 'human', 'value': 'x'}, {'from': 'gpt', 'value': 'y'}]
    dataset = build(
        rows=[{'conversations': talk}, {'conversations': short}], map_fn=llava_map_fn, template=chat_template_map_fn,
        max_length=64,
    )  # fmt: skip
    assert len(dataset) == 1
    assert [problem.index for problem in dataset.overlong_samples] == [0]
