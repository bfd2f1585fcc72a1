"""check-data says which pictures the image processor does not show whole, and the setting that it names does."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.apps.data.conftest import report_of
from vlmtune.apps.data.crops import find_crops
from vlmtune.cli import main
from vlmtune.data import Processor
from vlmtune.structures import ImageSize

SHAPES = {'line': (200, 40), 'column': (40, 200), 'photo': (160, 90), 'square': (90, 90), 'camera': (120, 90)}
WHOLE = 'image_processor=dict(do_center_crop=False, size=dict(height=42, width=42))'


@pytest.fixture
def config(tmp_path, write_config, tiny_model):
    """A row for each of ``SHAPES``; LLaVA-1.5 sees a square of 42 pixels."""
    rows = []
    for name, size in SHAPES.items():
        Image.new('RGB', size, 'red').save(tmp_path / f'{name}.png')
        turns = [{'from': 'human', 'value': f'<image>\n{name}?'}, {'from': 'gpt', 'value': 'red'}]
        rows.append({'image': f'{name}.png', 'conversations': turns})
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    path = Path(write_config(tmp_path / 'rows.json', tmp_path, model=str(tiny_model('llava'))))
    path.write_text(path.read_text().replace('type=Processor,', "type=Processor, prompt_template='vicuna',"))
    return path


def test_pictures_that_lose_more_than_a_quarter_are_one_warning(config, capsys):
    code, report = report_of(capsys, str(config))
    assert (code, report['errors'], report['warnings']) == (0, 0, 1)
    assert report['tokens']['crops'] == dict(share=0.6, setting=WHOLE)  # a line, a column, 16:9; 4:3 loses a quarter
    assert main(['check-data', str(config)]) == 0
    assert 'warning: 60% of the pictures lose more than 25% of their area to the crop of the image processor; ' in (
        out := capsys.readouterr().out
    )
    assert out.splitlines()[-1] == '0 errors, 1 warnings'


def test_with_the_setting_that_it_names_there_is_none(config, capsys):
    config.write_text(config.read_text().replace('type=Processor,', f'type=Processor, {WHOLE},'))
    code, report = report_of(capsys, str(config))
    assert (code, report['warnings'], report['tokens']['crops']) == (0, 0, None)


@pytest.mark.parametrize(
    ('model', 'settings'), [('llava', dict(do_pad=True)), ('llava_next', {}), ('internvl', {}), ('qwen2_5_vl', {})]
)
def test_where_nothing_is_cropped_away_nothing_is_said(tiny_model, model, settings):
    assert find_crops(Processor(str(tiny_model(model)), image_processor=settings), [ImageSize(40, 200)]) is None
