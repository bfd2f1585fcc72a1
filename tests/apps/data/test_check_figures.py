"""The figures of check-data are those of a run, also under other limits."""

from pathlib import Path

import numpy as np
import pytest

from tests.apps.data.conftest import report_of
from vlmtune.apps.data.alternatives import Room, Shape, image_limits, max_lengths
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.engine.build import build_data
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart


def test_a_clean_data_set_is_as_a_run_finds_it(tiny_data, write_config, capsys):
    data = tiny_data('llava', rows=24)
    config = write_config(data.data_path, data.image_folder)
    code, report = report_of(capsys, config)
    assert (code, report['ok'], report['errors'], report['warnings']) == (0, True, 0, 0)
    _, loader = build_data(load_config(config))
    tokens, lengths = report['tokens'], loader.dataset.lengths
    assert tokens['samples'] == len(loader.dataset)
    assert tokens['tokens'] == lengths.sum()
    assert tokens['packs'] == len(loader.batch_sampler.plan)
    assert tokens['steps'] == len(loader)
    assert tokens['density'] == pytest.approx(lengths.sum() / (len(loader.batch_sampler.plan) * 128))
    token = loader.dataset.processor.image_token_id
    assert tokens['image_tokens'] == sum((s.input_ids == token).sum() for s in loader.dataset.samples)
    assert tokens['supervised'] == sum((s.labels[1:] != -100).sum() for s in loader.dataset.samples)


def test_the_histogram_holds_every_sample_once(tiny_data, write_config, capsys):
    data = tiny_data('llava', rows=24)
    _, report = report_of(capsys, write_config(data.data_path, data.image_folder))
    _, loader = build_data(load_config(write_config(data.data_path, data.image_folder)))
    lengths, bars = loader.dataset.lengths, report['tokens']['histogram']
    for bar in bars:
        assert bar['samples'] == ((lengths >= bar['first']) & (lengths <= bar['last'])).sum()
    assert sum(bar['samples'] for bar in bars) == 24
    assert bars[-1]['last'] == lengths.max()


@pytest.mark.parametrize('pack', [True, False])
def test_other_limits_cost_what_a_run_with_them_costs(tiny_data, write_config, capsys, pack):
    """Up to 2,000 samples the figures are exact."""
    data = tiny_data('llava', rows=24)
    config = write_config(data.data_path, data.image_folder, max_length=80, pack=pack, batch_size=1 if pack else 3)
    _, report = report_of(capsys, config)
    lengths, pixels = report['tokens']['alternatives']
    assert (lengths['setting'], lengths['now']) == ('max_length', 80)
    assert [row['value'] for row in lengths['values']] == [20, 40, 80, 160]
    assert (pixels['setting'], pixels['now']) == ('max_pixels', 16 * 28 * 28)
    rows = [('max_length', lengths['values'][i]) for i in (1, 2, 3)]
    rows += [('processor.image_processor', row) for row in pixels['values']]
    assert len({row['tokens'] for _, row in rows}) >= 4
    for name, row in rows:
        value = {'max_pixels': row['value'], 'min_pixels': min(row['value'], 4 * 28 * 28)}
        changed = load_config(config, {name: row['value'] if name == 'max_length' else value})
        _, loader = build_data(changed)
        assert row['tokens'] == loader.dataset.lengths.sum()
        assert row['too_long'] == 24 - len(loader.dataset)
        assert row['packs'] == pytest.approx(len(loader.batch_sampler.plan), abs=1)  # packs differ by the seed


@pytest.mark.parametrize(
    ('model', 'settings'),
    [
        ('internvl', lambda value: {'max_patches': value}),
        ('smolvlm', lambda value: {'size': {'longest_edge': value}}),
    ],
)
def test_every_family_is_counted_as_its_processor_would(tiny_model, model, settings):
    sizes = [(300, 40), (64, 64), (500, 400), (30, 200)]
    text = Conversation(
        (Message('user', (ImagePart(0), TextPart('what?'))), Message('assistant', (TextPart('it'),))),
        (ImageRef(path='a.png'),),
    )

    def lengths(**options):
        processor = Processor(str(tiny_model(model)), **options)
        return [processor.tokenize(text, image_sizes=[ImageSize(*size)]) for size in sizes]

    shapes = [Shape.of(sample, image_token=None, weight=1.0, planned=True) for sample in lengths()]
    (found,) = image_limits(shapes, processor=Processor(str(tiny_model(model))), room=Room(10_000))
    assert len({row.tokens for row in found.values}) > 1
    for row in found.values:
        assert row.tokens == sum(map(len, lengths(image_processor=settings(row.value))))


def test_a_sample_stands_for_the_whole():
    """2,000 shapes that weigh 50 each: tokens and samples are scaled up, packs within 2 %."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 1000, 2000)
    light = max_lengths([Shape(int(t), 0, 0, (), 1.0, True) for t in tokens], room=Room(800))
    heavy = max_lengths([Shape(int(t), 0, 0, (), 50.0, True) for t in tokens], room=Room(800))
    for one, many in zip(light.values, heavy.values, strict=True):
        assert many.tokens == 50 * one.tokens
        assert many.too_long == 50 * one.too_long
        assert many.packs == pytest.approx(50 * one.packs, rel=0.02)


def test_a_mixture_is_checked_member_by_member(tiny_data, write_config, capsys):
    data, other = tiny_data('llava', rows=8), tiny_data('sharegpt', rows=4)
    config = write_config(data.data_path, data.image_folder)
    text = (
        Path(config)
        .read_text()
        .replace(
            'train_dataloader = dict(dataset=dataset',
            f'other = dict(type=SupervisedDataset, rows=dict(type=load_rows, path={str(other.data_path)!r}),\n'
            '    dataset_map_fn=dict(type=sharegpt_map_fn), template_map_fn=dict(type=chat_template_map_fn),\n'
            f'    max_length=max_length, image_folder={str(other.image_folder)!r})\n'
            'mixed = dict(type=MixedDataset, datasets=[dataset, other], repeats=[2, 1])\n'
            'train_dataloader = dict(dataset=mixed',
        )
    )
    Path(config).write_text(text)
    code, report = report_of(capsys, config)
    assert code == 0
    assert [data_set['rows'] for data_set in report['data_sets']] == [8, 4]
    assert report['tokens']['samples'] == 2 * 8 + 4
