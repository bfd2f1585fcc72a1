"""check-data: every kind of broken row is named, none stops it, and its figures are those of a run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.apps.data.alternatives import Room, Shape, image_limits, max_lengths
from vlmtune.apps.data.check_data import check_data
from vlmtune.apps.data.data_problems import ERROR_KINDS, Problem, Progress
from vlmtune.apps.data.file_checks import check_files
from vlmtune.apps.data.image_checks import check_image
from vlmtune.apps.train import train
from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.data import Processor, llava_map_fn, load_rows
from vlmtune.engine.runner import build_data
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.testing import write_broken_data
from vlmtune.utils.errors import ConfigError, DataError

CONFIG = """
from vlmtune.data import MixedDataset, Processor, SupervisedDataset, chat_template_map_fn, load_rows
from vlmtune.data import {map_fn}, sharegpt_map_fn
from vlmtune.engine import TrainLoop

max_length = {max_length}
processor = dict(type=Processor, pretrained_model_name_or_path={model!r})
dataset = dict(type=SupervisedDataset, rows=dict(type=load_rows, path={data!r}), dataset_map_fn=dict(type={map_fn}),
               template_map_fn=dict(type=chat_template_map_fn, loss={loss!r}), image_folder={images!r},
               max_length=max_length)
train_dataloader = dict(dataset=dataset, batch_size={batch_size}, pack_to_max_length={pack})
train_cfg = dict(type=TrainLoop, max_epochs=1, accumulative_counts=2)
randomness = dict(seed=3)
"""
TRAINING = """
from mmengine.optim import OptimWrapper
from torch.optim import SGD
from vlmtune.models import SupervisedFinetune

model = dict(type=SupervisedFinetune, pretrained_model_name_or_path={model!r}, tune=dict(llm='full'), dtype='float32')
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=1e-3))
"""


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    return write_broken_data(tmp_path_factory.mktemp('broken') / 'data')


@pytest.fixture
def write_config(tmp_path, tiny_model):
    """``write_config(data_path, image_folder, map_fn='llava_map_fn')``: the path of a config, in an empty folder."""

    def write(data_path, image_folder, **settings):
        defaults = dict(
            model=str(tiny_model('qwen2_5_vl')), map_fn='llava_map_fn', loss='all_turns', max_length=128, pack=True
        )
        values = {**defaults, 'batch_size': 1, 'data': str(data_path), 'images': str(image_folder), **settings}
        (tmp_path / 'config').mkdir(exist_ok=True)
        path = tmp_path / 'config' / 'mine.py'
        path.write_text(CONFIG.format(**values))
        return str(path)

    return write


def report_of(capsys, *arguments):
    """Exit code and JSON report of the command."""
    capsys.readouterr()
    code = main(['check-data', *arguments, '--json'])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    return code, json.loads(captured.out)


def lines_of(report, kind):
    return [int(p['where'].split(':')[1]) for p in report['data_sets'][0]['problems'] if p['kind'] == kind]


class TestBrokenRows:
    @pytest.fixture
    def config(self, broken, write_config):
        return write_config(
            broken.data_path, broken.image_folder, map_fn='openai_map_fn', loss='first_turn', max_length=512
        )

    def test_every_broken_row_is_named_with_its_kind_and_no_other(self, broken, config, capsys):
        code, report = report_of(capsys, config)
        assert code == 1
        (data_set,) = report['data_sets']
        assert data_set['rows'] == len(broken.data_path.read_bytes().splitlines())
        found = {
            int(problem['where'].split(':')[1]): problem['kind']
            for problem in data_set['problems']
            if problem['kind'] in ERROR_KINDS
        }
        assert found == broken.kinds
        assert lines_of(report, 'overlong') == broken.overlong
        assert lines_of(report, 'duplicate') == broken.duplicates
        assert report['stops'] is None
        assert report['tokens']['samples'] == data_set['rows'] - len(found) - len(broken.overlong) + len(broken.cut)
        assert report['errors'] == len(found) == len(broken.kinds)
        for problem in data_set['problems']:
            assert problem['reason']
            assert data_set['rows'] > problem['index'] >= 0

    def test_decode_finds_what_headers_do_not_show(self, broken, config, capsys):
        _, report = report_of(capsys, config, '--decode')
        assert set(broken.bad_pixels) < set(lines_of(report, 'broken_image'))
        good = set(broken.good)
        assert not good & {int(p['where'].split(':')[1]) for p in report['data_sets'][0]['problems']}

    def test_file_checks_run_where_the_model_is_not(self, broken, config, capsys):
        code, report = report_of(capsys, config, '--cfg-options', 'processor.pretrained_model_name_or_path=/nowhere')
        assert code == 1
        assert report['tokens'] is None
        assert '/nowhere' in report['tokens_not_run']
        found = {p['kind'] for p in report['data_sets'][0]['problems']}
        assert found == {*broken.kinds.values(), 'duplicate'} - {'unfit_sample', 'nothing_learned'}
        assert main(['check-data', config, '--cfg-options', 'processor.pretrained_model_name_or_path=/nowhere']) == 1
        assert 'token checks were not run: ' in capsys.readouterr().out

    def test_the_table_counts_every_kind_and_names_places(self, broken, config, capsys):
        assert main(['check-data', config]) == 1
        out = capsys.readouterr().out
        assert 'error:           3 x row cannot be read' in out
        assert 'image is larger' not in out
        first = min(line for line, kind in broken.kinds.items() if kind == 'missing_image')
        assert f'rows.jsonl:{first}: image not found: ' in out
        assert out.splitlines()[-1] == f'{len(broken.kinds)} errors, 2 warnings'

    def test_where_overlong_stops_a_run_it_is_an_error(self, broken, config, capsys):
        _, report = report_of(capsys, config, '--cfg-options', "dataset.overlong='error'")
        assert lines_of(report, 'overlong_refused') == broken.overlong
        assert report['errors'] == len(broken.kinds) + 1

    def test_a_run_that_skips_them_names_every_one_and_ends(self, broken, config, tmp_path, tiny_model):
        """One epoch meets those, too, whose pixels only turn out to be broken when they are decoded."""
        text = TRAINING.format(model=str(tiny_model('qwen2_5_vl'))) + Path(config).read_text()
        Path(config).write_text(text)
        settings = {'dataset.on_bad_sample': 'skip', 'dataset.bad_sample_budget': 1.0}
        train(config, work_dir=str(tmp_path / 'work'), overrides=settings)
        lines = (tmp_path / 'work' / 'bad_samples.jsonl').read_text('utf-8').splitlines()
        noted = [json.loads(line) for line in lines]
        named = sorted(int(bad['where'].split(':')[1]) for bad in noted)
        assert named == sorted([*broken.kinds, *broken.overlong, *broken.bad_pixels])
        assert all(bad['reason'] for bad in noted)

    def test_nothing_is_written(self, config, capsys):
        report_of(capsys, config)
        assert os.listdir(Path(config).parent) == ['mine.py']


class TestFigures:
    def test_a_clean_data_set_is_as_a_run_finds_it(self, tiny_data, write_config, capsys):
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

    def test_the_histogram_holds_every_sample_once(self, tiny_data, write_config, capsys):
        data = tiny_data('llava', rows=24)
        _, report = report_of(capsys, write_config(data.data_path, data.image_folder))
        _, loader = build_data(load_config(write_config(data.data_path, data.image_folder)))
        lengths, bars = loader.dataset.lengths, report['tokens']['histogram']
        for bar in bars:
            assert bar['samples'] == ((lengths >= bar['first']) & (lengths <= bar['last'])).sum()
        assert sum(bar['samples'] for bar in bars) == 24
        assert bars[-1]['last'] == lengths.max()

    @pytest.mark.parametrize('pack', [True, False])
    def test_other_limits_cost_what_a_run_with_them_costs(self, tiny_data, write_config, capsys, pack):
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
    def test_every_family_is_counted_as_its_processor_would(self, tiny_model, model, settings):
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

    def test_a_sample_stands_for_the_whole(self):
        """2,000 shapes that weigh 50 each: tokens and samples are scaled up, packs within 2 %."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(50, 1000, 2000)
        light = max_lengths([Shape(int(t), 0, 0, (), 1.0, True) for t in tokens], room=Room(800))
        heavy = max_lengths([Shape(int(t), 0, 0, (), 50.0, True) for t in tokens], room=Room(800))
        for one, many in zip(light.values, heavy.values, strict=True):
            assert many.tokens == 50 * one.tokens
            assert many.too_long == 50 * one.too_long
            assert many.packs == pytest.approx(50 * one.packs, rel=0.02)

    def test_a_mixture_is_checked_member_by_member(self, tiny_data, write_config, capsys):
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


class TestWhatARunCannotDo:
    def test_a_function_that_fails_is_named_with_every_row(self, tiny_data, write_config, capsys):
        data = tiny_data('llava', rows=4)
        config = write_config(data.data_path, data.image_folder, map_fn='my_map_fn')
        (Path(config).parent / 'my_functions.py').write_text('def my_map_fn(row):\n    return row["answer"]\n')
        text = (
            Path(config)
            .read_text()
            .replace('vlmtune.data import my_map_fn,', 'my_functions import my_map_fn\nfrom vlmtune.data import')
        )
        Path(config).write_text(text)
        code, report = report_of(capsys, config)
        assert code == 1
        assert report['data_sets'][0]['counts'] == {'failed_function': 4}
        assert report['stops'].startswith("dataset_map_fn fails at data.json[0] with KeyError: 'answer'")

    def test_no_usable_row(self, tiny_data, write_config, capsys):
        data = tiny_data('llava', rows=4)
        code, report = report_of(capsys, write_config(data.data_path, data.image_folder, max_length=5))
        assert code == 1
        assert 'none of 4 rows can be used' in report['stops']
        assert report['tokens'] is None

    def test_config_mistakes_and_missing_files_are_one_line(self, tiny_data, write_config):
        data = tiny_data('llava', rows=4)
        with pytest.raises(DataError, match='data file not found'):
            check_data(write_config('/nowhere.json', data.image_folder))
        with pytest.raises(DataError, match='image_folder /nowhere does not exist'):
            check_data(write_config(data.data_path, '/nowhere'))
        with pytest.raises(ConfigError, match='unknown argument'):
            check_data(write_config(data.data_path, data.image_folder), overrides={'dataset.max_lenght': 3})


def test_the_first_rows_of_a_stream_are_checked(broken, write_config, capsys, monkeypatch):
    config = write_config(broken.data_path, broken.image_folder, map_fn='openai_map_fn', loss='first_turn')
    code, planned = report_of(capsys, config)
    text = Path(config).read_text()
    assert 'type=SupervisedDataset' in text
    text = text.replace('SupervisedDataset', 'StreamingDataset').replace('load_rows', 'stream_rows')
    Path(config).write_text(text)
    again, streamed = report_of(capsys, config)
    assert (again, streamed['tokens']) == (code, planned['tokens'])
    found, expected = (
        [(p['index'], p['where'], p['kind']) for p in report['data_sets'][0]['problems']]
        for report in (streamed, planned)
    )
    assert found == expected
    assert len(found) > 25
    monkeypatch.setattr('vlmtune.apps.data.train_data.STREAM_ROWS', 7)
    (data_set,) = report_of(capsys, config)[1]['data_sets']
    assert (data_set['name'], data_set['rows']) == ('rows.jsonl (the first 7 rows)', 7)


def test_problems_of_several_processes_come_in_order(broken):
    rows = load_rows(broken.data_path)
    one = check_files(rows, llava_map_fn, image_folder=broken.image_folder, workers=0)
    two = check_files(rows, llava_map_fn, image_folder=broken.image_folder, workers=2)
    assert one == two
    assert [p.index for p in one.problems if p.kind == 'wrong_row'] == sorted(
        p.index for p in one.problems if p.kind == 'wrong_row'
    )


def test_a_conversation_of_the_users_own_function_is_checked():
    question, picture = Message('user', (TextPart('why?'),)), ImageRef(data=b'not looked at')

    def mine(row):
        answer = Message('assistant', (TextPart(row.get('answer', 'so')),))
        return 'text' if row.get('text') else Conversation((question, answer), (picture,) * row.get('images', 0))

    rows = [{'text': True}, {'answer': '  '}, {'images': 1}, {}]
    report = check_files(rows, mine, image_folder=None, workers=0)
    unknown = 'dataset_map_fn returned a str; expected a Conversation'
    assert [problem for problem in report.problems if problem.index != 2] == [
        Problem(0, 'rows[0]', 'wrong_row', unknown),
        Problem(1, 'rows[1]', 'empty_answer', 'message 1 (assistant) is empty; expected text'),
    ]
    assert [problem.kind for problem in report.problems if problem.index == 2] == ['mark_mismatch']


@pytest.mark.parametrize('name', ['photo.jpg', 'drawing.png'])
def test_a_file_that_was_cut_off_anywhere_is_found_and_a_whole_one_is_not(tmp_path, name):
    Image.effect_noise((80, 60), 90).convert('RGB').save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert check_image(ImageRef(path=name), root=tmp_path, decode=False) == (60, 80)
    assert check_image(ImageRef(data=whole + b'\0\0 and more'), root=None, decode=False) == (60, 80)
    for share in (0.3, 0.6, 0.9):
        cut = whole[: int(len(whole) * share)]
        with pytest.raises(DataError, match='cannot be read|not an image'):
            check_image(ImageRef(data=cut), root=None, decode=False)


def test_progress_is_told_every_few_seconds(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    progress = Progress('rows checked', total=20_000)
    with caplog.at_level('INFO', logger='vlmtune'):
        for done in range(0, 20_001, 1000):
            progress.reached(done)
            now[0] += 1
    assert caplog.messages == [
        'rows checked: 5,000 of 20,000',
        'rows checked: 10,000 of 20,000',
        'rows checked: 15,000 of 20,000',
        'rows checked: 20,000 of 20,000',
    ]
