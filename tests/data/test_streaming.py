"""Streams: windows that are planned while the run goes on, and a resume that is exact."""

import json
from itertools import islice

import pytest
import torch

from vlmtune.data import (
    StreamingDataset,
    alpaca_map_fn,
    build_train_loader,
    chat_template_map_fn,
    llava_map_fn,
    plain_text_map_fn,
    stream_rows,
    text_map_fn,
)
from vlmtune.data.row_streams import IterableStream
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError


def row(number, *, words=None):
    answer = ' '.join(['word'] * (words if words is not None else 1 + number % 7))
    talk = [{'from': 'human', 'value': f'Number {number}?'}, {'from': 'gpt', 'value': answer}]
    return {'id': str(number), 'conversations': talk}


@pytest.fixture
def write(tmp_path):
    """``write(rows)``: the path of a .jsonl file."""

    def file(rows):
        path = tmp_path / 'rows.jsonl'
        path.write_text(''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in rows))
        return path

    return file


@pytest.fixture
def stream(processor):
    def build(rows, **settings):
        return StreamingDataset(
            rows,
            **{
                'processor': processor('llava', prompt_template='vicuna'),
                'dataset_map_fn': llava_map_fn,
                'template_map_fn': chat_template_map_fn,
                'max_length': 64,
                'shuffle_window': 8,
                **settings,
            },
        )

    return build


class Counted:
    """Counts the rows that were read."""

    def __init__(self, count):
        self.rows, self.read = [row(i) for i in range(count)], 0

    def __iter__(self):
        for each in self.rows:
            self.read += 1
            yield each


def sampler_of(dataset, **settings):
    settings = {'seed': 0, 'pack_to_max_length': True, **settings}
    return build_train_loader(dataset, **settings).batch_sampler


def take(sampler, steps):
    """The places of the samples of so many steps, pack by pack, as the loop takes them."""
    stream, out = iter(sampler), []
    for _ in range(steps):
        packs = [next(stream) for _ in range(sampler.next_step())]
        assert packs == sampler.current_packs()
        out.append([[key.sample.where for key in pack] for pack in packs])
        sampler.finish_step()
    return out


def flat(steps):
    return [place for step in steps for pack in step for place in pack]


# ---- order


def test_every_row_once_a_pass_and_in_another_order_in_the_next(stream, write):
    dataset = stream(stream_rows(write([row(i) for i in range(20)])))
    places = flat(take(sampler_of(dataset), 40))
    first, second = places[:20], places[20:40]
    everything = {f'rows.jsonl:{line}' for line in range(1, 21)}
    assert set(first) == set(second) == everything
    assert first != second


def test_the_order_is_a_function_of_the_seed(stream, write):
    dataset = stream(stream_rows(write([row(i) for i in range(20)])))
    whole = take(sampler_of(dataset), 6)
    assert take(sampler_of(dataset), 6) == whole != take(sampler_of(dataset, seed=1), 6)


def test_rows_of_a_window_stay_in_it(stream, write):
    """And are shuffled there: rows 1 to 8 come first, in another order."""
    places = flat(take(sampler_of(stream(stream_rows(write([row(i) for i in range(20)])))), 10))
    assert places[:8] != [f'rows.jsonl:{i}' for i in range(1, 9)]
    assert set(places[:8]) == {f'rows.jsonl:{i}' for i in range(1, 9)}


def test_a_source_that_ends_with_a_window(stream):
    places = flat(take(sampler_of(stream([row(i) for i in range(16)])), 30))
    assert sorted(places[:16]) == sorted(places[16:32]) == sorted(f'rows[{i}]' for i in range(16))


def test_packs_keep_both_budgets(stream):
    dataset = stream([row(i) for i in range(64)], shuffle_window=64)
    for pack in islice(sampler_of(dataset), 20):
        assert sum(len(key.sample.planned) for key in pack) <= 64


def test_without_packing(stream):
    sampler = sampler_of(stream([row(i) for i in range(16)]), pack_to_max_length=False, batch_size=4, shuffle=False)
    assert flat(take(sampler, 2)) == [f'rows[{i}]' for i in range(8)]


@pytest.mark.parametrize('total', [2, 4])
def test_ranks_share_every_step(stream, total):
    rows = [row(i) for i in range(40)]
    alone = take(sampler_of(stream(rows), accumulative_counts=total), 6)
    ranks = [
        take(sampler_of(stream(rows), accumulative_counts=total // 2, rank=rank, world_size=2), 6) for rank in range(2)
    ]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert sorted(whole) == sorted(shares[0] + shares[1])


def test_memory_is_bounded_by_the_window(stream):
    """Three windows are read for the packs of the first; not the source, which has a hundred."""
    rows = Counted(800)
    dataset = stream(IterableStream(rows, name='rows'))
    next(iter(sampler_of(dataset)))
    assert rows.read <= 8
    take(sampler_of(dataset), 1)
    assert rows.read <= 3 * 8


# ---- resuming


@pytest.mark.parametrize('steps', [0, 1, 3, 7, 12])
@pytest.mark.parametrize('counts', [1, 3])
def test_a_resume_goes_on_where_it_was(steps, counts, stream, write):
    path = write([row(i) for i in range(20)])
    whole = take(sampler_of(stream(stream_rows(path)), accumulative_counts=counts), steps + 8)
    first = sampler_of(stream(stream_rows(path)), accumulative_counts=counts)
    take(first, steps)
    state = json.loads(json.dumps(first.state_dict()))
    second = sampler_of(stream(stream_rows(path)), accumulative_counts=counts)
    second.load_state_dict(state)
    assert take(second, 8) == whole[steps:]


def test_a_resume_yields_the_same_batches(stream, write):
    """With workers, which have been handed more than was learned when the state is taken."""
    path = write([row(i) for i in range(40)])

    def loader():
        return build_train_loader(stream(stream_rows(path)), seed=0, pack_to_max_length=True, num_workers=2)

    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
        first.batch_sampler.finish_step()
    second = loader()
    second.batch_sampler.load_state_dict(first.batch_sampler.state_dict())
    for _, a, b in zip(range(4), batches, second, strict=False):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resume_reads_one_window(stream):
    rows = [row(i) for i in range(800)]
    first = sampler_of(stream(rows))
    take(first, 100)

    class Skippable(Counted):
        def skip(self, count):
            for each in self.rows[count:]:
                self.read += 1
                yield each

    source = Skippable(800)
    second = sampler_of(stream(IterableStream(source, name='rows')))
    second.load_state_dict(first.state_dict())
    assert source.read == 8


@pytest.mark.parametrize('pack', [True, False])
def test_another_source_is_refused(pack, stream, write):
    """Also where the plan is the same, as that of batches is: it asks for the number of samples alone."""
    path = write([row(i) for i in range(20)])
    first = sampler_of(stream(stream_rows(path)), pack_to_max_length=pack)
    take(first, 2)
    state = first.state_dict()
    write([row(i, words=9) for i in range(20)])
    with pytest.raises(CheckpointError, match='the data of this run is not that of the checkpoint'):
        sampler_of(stream(stream_rows(path)), pack_to_max_length=pack).load_state_dict(state)


def test_a_position_that_no_window_has_is_refused(stream, write):
    path = write([row(i) for i in range(20)])
    state = sampler_of(stream(stream_rows(path))).state_dict()
    for consumed in (-1, 10**6):
        with pytest.raises(CheckpointError, match=f'stands at pack {consumed} of a window that has'):
            sampler_of(stream(stream_rows(path))).load_state_dict({**state, 'consumed': consumed})


# ---- sources


def test_a_parquet_file_is_streamed(stream, tmp_path):
    datasets = pytest.importorskip('datasets')
    path = tmp_path / 'rows.parquet'
    datasets.Dataset.from_list([row(i) for i in range(20)]).to_parquet(str(path))
    first = sampler_of(stream(stream_rows(path)))
    whole = take(first, 4)
    assert set(flat(whole)) <= {f'rows.parquet[{i}]' for i in range(20)}
    second = sampler_of(stream(stream_rows(path)))
    second.load_state_dict(first.state_dict())
    assert take(second, 3) == take(first, 3)


@pytest.mark.parametrize('name', ['rows.json', 'rows.csv'])
def test_files_without_lines_of_their_own_are_streamed_and_resumed(name, stream, tmp_path):
    path = tmp_path / name
    if name == 'rows.json':
        path.write_text(json.dumps([row(i) for i in range(20)]))
        settings = {}
    else:
        path.write_text('instruction,output\n' + ''.join(f'question {i},answer {i}\n' for i in range(20)))
        settings = dict(dataset_map_fn=alpaca_map_fn)
    first = sampler_of(stream(stream_rows(path), **settings))
    whole = take(first, 4)
    assert all(place.startswith(name) for place in flat(whole))
    second = sampler_of(stream(stream_rows(path), **settings))
    second.load_state_dict(first.state_dict())
    assert take(second, 3) == take(first, 3)


def test_a_source_that_is_not_there(tmp_path):
    for name in ('gone.jsonl', 'gone.parquet'):
        with pytest.raises(DataError, match=f'data file not found: .*{name}'):
            stream_rows(tmp_path / name)


# ---- bad rows, and what a stream has not


def test_a_bad_row_stops_the_run_and_is_named(stream, write):
    path = write([row(0), '{"id": ', row(2)])
    with pytest.raises(DataError, match=r'^rows.jsonl:2: broken JSON at column'):
        next(iter(sampler_of(stream(stream_rows(path)))))


def test_bad_rows_are_skipped_within_a_budget(stream, write, caplog):
    path = write([row(0), '[1]', row(2), row(3)])
    dataset = stream(stream_rows(path), on_bad_sample='skip', bad_sample_budget=0.25)
    assert set(flat(take(sampler_of(dataset), 2))) == {'rows.jsonl:1', 'rows.jsonl:3', 'rows.jsonl:4'}
    assert 'rows.jsonl:2: a row is of type list; expected an object' in caplog.text
    with pytest.raises(DataError, match='1 of the 4 rows up to rows.jsonl:4 are bad, more than bad_sample_budget=0.1'):
        next(iter(sampler_of(stream(stream_rows(path), on_bad_sample='skip', bad_sample_budget=0.1))))


def test_what_cannot_be_used_is_written_once(stream, write, tmp_path, tiny_data):
    folder = tmp_path / 'images'
    folder.mkdir()
    whole = (tiny_data('llava').image_folder / '000.png').read_bytes()
    (folder / 'cut.png').write_bytes(whole[: len(whole) // 2])
    shown = row(1) | {'image': 'cut.png'}
    shown['conversations'] = [{'from': 'human', 'value': '<image>'}, shown['conversations'][1]]
    file = tmp_path / 'work' / 'bad_samples.jsonl'
    data = stream(
        stream_rows(write([row(0), '{', row(2, words=200), shown])),
        on_bad_sample='skip', bad_sample_budget=1.0, image_folder=str(folder), bad_samples_file=str(file),
    )  # fmt: skip
    for _ in range(2):  # as the source is read again
        for key in data.plan(list(data.stream.read())):
            data[key]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(bad['index'], bad['where'], bad['kind'], bad['images']) for bad in written] == [
        (1, 'rows.jsonl:2', 'bad', []),
        (2, 'rows.jsonl:3', 'overlong', []),
        (3, 'rows.jsonl:4', 'undecodable', ['cut.png']),
    ]


def test_long_rows(stream, caplog):
    rows = [row(0), row(1, words=100), row(2)]
    assert set(flat(take(sampler_of(stream(rows)), 1))) == {'rows[0]', 'rows[2]'}
    assert '1 of the 3 rows up to rows[2] are longer than 64 tokens and were dropped' in caplog.text
    with pytest.raises(DataError, match=r'rows\[1\]: has \d+ tokens, max_length is 64'):
        next(iter(sampler_of(stream(rows, overlong='error'))))


def test_long_plain_texts_are_cut(stream):
    dataset = stream(
        [{'text': 'word ' * 300}], overlong='split', dataset_map_fn=text_map_fn, template_map_fn=plain_text_map_fn
    )
    lengths = sorted(len(key.sample.planned) for pack in islice(sampler_of(dataset), 3) for key in pack)
    assert lengths[-2:] == [64, 64]


def test_a_stream_without_a_usable_row_ends(stream):
    with pytest.raises(DataError, match='not one row of the stream can be used'):
        next(iter(sampler_of(stream([row(0, words=100)]))))
    with pytest.raises(DataError, match='not one row of the stream can be used'):
        next(iter(sampler_of(stream([]))))


def test_a_stream_has_no_epochs(stream):
    sampler = sampler_of(stream([row(0)]))
    assert sampler.endless
    with pytest.raises(ConfigError, match='a stream has no epochs; set max_steps'):
        sampler.steps_in_epoch(0)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(shuffle_window=0), 'shuffle_window=0: expected a positive number of rows'),
        (dict(overlong='keep'), "overlong='keep' is unknown"),
        (dict(on_bad_sample='keep'), "on_bad_sample='keep' is unknown"),
    ],
)
def test_mistakes(settings, message, stream):
    with pytest.raises(ConfigError, match=message):
        stream([row(0)], **settings)


def test_an_image_above_the_patch_budget_is_named(stream, tiny_data):
    data = tiny_data('llava', rows=4)
    rows = json.loads(data.data_path.read_text())
    dataset = stream(rows, image_folder=str(data.image_folder), max_length=256)
    with pytest.raises(DataError, match=r'rows\[\d\]: has \d+ vision patches, a pack takes max_patches=1; raise it'):
        next(iter(sampler_of(dataset, max_patches=1)))
