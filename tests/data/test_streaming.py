"""What a stream reads, and what it says of rows that cannot be used."""

import json
from itertools import islice

import pytest

from tests.data.streams import flat, row, sampler_of, take
from vlmtune.data import alpaca_map_fn, plain_text_map_fn, stream_rows, text_map_fn
from vlmtune.utils.errors import ConfigError, DataError

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


@pytest.mark.parametrize('name', ['rows.JSONL', 'rows.JSON'])
def test_the_case_of_a_suffix_does_not_count(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(row(0) if name == 'rows.JSONL' else [row(0)]))
    assert [found.load() for found in stream_rows(tmp_path / name).read()] == [row(0)]


def test_no_hub_is_asked_that_does_not_answer(monkeypatch):
    monkeypatch.setattr('vlmtune.data.row_streams.hub_answers', lambda: False)
    with pytest.raises(DataError, match=r'data/trian: there is no /.*/data/trian, and the hub .* cannot be reached'):
        stream_rows('data/trian')


def test_a_data_set_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip('datasets')
    found = datasets.Dataset.from_list([row(0)]).to_iterable_dataset()
    (tmp_path / 'org___name' / 'default').mkdir(parents=True)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: found)
    monkeypatch.setattr('vlmtune.data.row_streams.hub_answers', lambda: False)
    assert [found.load() for found in stream_rows('org/name').read()] == [row(0)]


def test_a_file_of_modelscope(monkeypatch, write):
    path = write([row(0)])
    asked = []
    monkeypatch.setattr(
        'vlmtune.data.row_streams.modelscope_folder', lambda name, **kinds: asked.append((name, kinds['kind'])) or path
    )
    assert [found.load() for found in stream_rows('modelscope://org/set/rows.jsonl').read()] == [row(0)]
    assert asked == [('modelscope://org/set/rows.jsonl', 'dataset')]


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
    with pytest.raises(DataError, match='1 of the 4 rows up to rows.jsonl:4 are bad, more than bad_sample_budget=0;'):
        next(iter(sampler_of(stream(stream_rows(path), on_bad_sample='skip', bad_sample_budget=0))))


def test_one_bad_row_in_a_short_last_window_ends_no_run(stream, write):
    path = write([row(0), row(1), row(2), row(3), row(4), '[1]'])
    dataset = stream(stream_rows(path), on_bad_sample='skip', shuffle_window=4)
    assert 'rows.jsonl:5' in flat(take(sampler_of(dataset), 5))
    path = write([row(0), row(1), '[0]', '[1]'])
    with pytest.raises(DataError, match='2 of the 4 rows up to rows.jsonl:4 are bad, more than bad_sample_budget=0.01'):
        next(iter(sampler_of(stream(stream_rows(path), on_bad_sample='skip'))))


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
