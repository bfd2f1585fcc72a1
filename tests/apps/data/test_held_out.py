"""check-data opens the rows of validation and test as a run does."""

import json
from pathlib import Path

import pytest

from tests.apps.data.conftest import report_of
from vlmtune.apps.data.held_out import check_held_out
from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.engine.build import build_validation
from vlmtune.utils.errors import DataError

HELD_OUT = """
from vlmtune.engine import ValLoop
from vlmtune.evaluation.metrics import exact_match

val_dataset = dict(dataset, rows=dict(type=load_rows, path={path!r}))
val_dataloader = dict(dataset=val_dataset, batch_size=2)
val_evaluator = dict(metrics=[dict(type=exact_match)], generation=dict(max_new_tokens=2))
val_cfg = dict(type=ValLoop, interval=1)
test_dataloader = dict(dataset=val_dataset, batch_size=2)
"""


@pytest.fixture
def config(tiny_data, write_config, tmp_path):
    """A config over good rows, whose held-out ones are those of ``held_out.json``, four and one broken."""
    data = tiny_data('llava', rows=8)
    rows = json.loads(Path(data.data_path).read_text())[:4]
    (tmp_path / 'held_out.json').write_text(json.dumps([*rows, {'id': 'broken'}]))
    path = Path(write_config(data.data_path, data.image_folder))
    path.write_text(path.read_text() + HELD_OUT.format(path=str(tmp_path / 'held_out.json')))
    return str(path)


def test_a_row_that_would_stop_a_run_is_an_error_in_the_words_of_the_run(config, capsys):
    code, report = report_of(capsys, config)
    assert (code, report['errors'], report['stops']) == (1, 2, None)
    val, test = report['held_out']
    cfg = load_config(config)
    with pytest.raises(DataError) as error:
        build_validation(cfg, processor=Processor(cfg.processor.pretrained_model_name_or_path))
    assert (val['name'], val['stops']) == ('val_dataloader', str(error.value))
    assert (test['name'], test['questions']) == ('test_dataloader', 0)
    assert test['stops'].startswith("sample 4 (held_out.json[4]): has no 'conversations'")
    assert main(['check-data', config]) == 1
    out = capsys.readouterr().out
    assert 'val_dataloader: error: a run would stop: held-out data: sample 4 (held_out.json[4])' in out
    assert out.splitlines()[-1] == '2 errors, 0 warnings'


def test_rows_that_may_be_bad_are_counted(config, capsys):
    skip = ('--cfg-options', 'dataset.on_bad_sample=skip', f'val_dataset.bad_samples_file={config}.bad')
    code, report = report_of(capsys, config, *skip)
    assert (code, report['errors']) == (0, 0)
    counts = dict(rows=5, questions=4, bad=1, stops=None)
    assert report['held_out'] == [dict(name=f'{name}_dataloader', **counts) for name in ('val', 'test')]
    assert not Path(f'{config}.bad').exists(), 'looking writes nothing'
    assert main(['check-data', config, *skip]) == 0
    assert 'test_dataloader: 5 rows, 4 questions, 1 rows left out\n' in capsys.readouterr().out


def test_mistakes_of_settings_and_functions_are_told_beside_the_rest(config):
    cfg = load_config(config)
    processor = Processor(cfg.processor.pretrained_model_name_or_path)

    def fail(row):
        return row['answer']

    cfg.val_cfg, cfg.test_dataloader.dataset.dataset_map_fn = None, fail
    val, test = check_held_out(cfg, processor=processor)
    assert val.stops is not None
    assert val.stops.startswith('val_dataloader needs val_cfg=')
    assert test.stops == "KeyError: 'answer', while asking sample 0 (held_out.json[0])"
    cfg.val_dataloader = cfg.test_dataloader = None
    assert check_held_out(cfg, processor=processor) == []
