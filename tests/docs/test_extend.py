"""The data set, the metric and the hook of docs/extend.md, at work together in one short run."""

import csv
import json
import re

from PIL import Image

from tests.docs.pages import ROOT, blocks
from tests.docs.test_config_parts import RECIPES, put_into
from vlmtune.cli import main

SHORT = ['max_epochs=0.5', 'batch_size=2', 'evaluation_inputs=[]', 'evaluation_images=[]', 'plan_cache_dir=None']
LOUD = ['custom_hooks.2.limit=0.0', 'custom_hooks.2.after=1', 'val_evaluator.generation.max_new_tokens=4']


def write_data(folder):
    """Rows as the page's map function reads them: a table to learn from, and a held-out one."""
    (folder / 'images').mkdir()
    rows = [dict(file=f'{i}.png', caption=f'A picture, number {i}.') for i in range(8)]
    for row in rows:
        Image.new('RGB', (64, 64), 'teal').save(folder / 'images' / row['file'])
    with (folder / 'captions.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['file', 'caption'])
        writer.writeheader()
        writer.writerows(rows)
    (folder / 'val.json').write_text(json.dumps(rows[:2]))


def test_what_the_page_adds_trains_scores_and_warns(tmp_path, monkeypatch):
    recipe = RECIPES['quickstart_lora'].read_text('utf-8')
    for block in (block for block in blocks() if block.page == 'docs/extend.md'):
        if title := re.fullmatch(r'python title=(\w+\.py)', block.info):
            (tmp_path / title[1]).write_text(block.text)
        elif block.info == 'python':
            recipe = put_into(recipe, block.text)
    (tmp_path / 'mine.py').write_text(recipe)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = f'pretrained_model_name_or_path={ROOT / "quickstart" / "base"}'
    options = [base, 'image_folder=images', *SHORT, *LOUD]
    assert main(['train', 'mine.py', '--work-dir', 'run', '--cfg-options', *options]) == 0
    (line,) = (tmp_path / 'run' / 'validation.jsonl').read_text().splitlines()
    assert json.loads(line)['same_first_word'] == 0
    (log,) = (tmp_path / 'run').glob('*/*.log')
    assert re.findall(r'WARNING - loss \d+\.\d{3} (.+)', log.read_text('utf-8')) == ['at step 2']
