"""check-data: every kind of broken row is named, and none stops it."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.apps.data.conftest import report_of
from vlmtune.apps.data.check_data import check_data
from vlmtune.apps.data.data_problems import ERROR_KINDS, Problem
from vlmtune.apps.data.file_checks import check_files
from vlmtune.apps.data.image_checks import check_image
from vlmtune.apps.train import train
from vlmtune.cli import main
from vlmtune.data import llava_map_fn, load_rows
from vlmtune.structures import Conversation, ImageRef, Message, TextPart
from vlmtune.testing import write_broken_data
from vlmtune.utils.errors import ConfigError, DataError

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
        assert (code, report['errors']) == (1, 1)
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
