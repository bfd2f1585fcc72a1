"""InternVL2 as OpenGVLab stores it, from the rows of docs/food_qa.md to an answer, through the command line."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.layouts import find_layout, open_weights
from vlmtune.models import load_model

ROOT = Path(__file__).resolve().parents[2]
NAME = 'internvl2_2b_lora_foodie'
DISHES = {'mapo tofu': 'red', 'char siu': 'brown', 'congee': 'white', 'soup': 'green', 'rice': 'blue', 'egg': 'yellow'}
CHOICES = ['Sichuan', 'Canton', 'Hunan', 'Shandong']
QUESTION = 'Which cuisine is it?\nA. Sichuan\nB. Canton\nC. Hunan\nD. Shandong'
STEPS = 24


@pytest.fixture(scope='module')
def food(tmp_path_factory) -> Path:
    """A set in the form of FoodieQA, and the rows that the program of the guide makes of it."""
    root = tmp_path_factory.mktemp('food')
    folder = root / 'data' / 'FoodieQA'
    (folder / 'images').mkdir(parents=True)
    items = []
    for i, (dish, colour) in enumerate(DISHES.items()):
        Image.new('RGB', (120, 60), colour).save(folder / 'images' / f'{i}.png')
        meta = {'food_name': dish, 'food_file': f'images/{i}.png', 'food_location': 'home'}
        items.append({'question': 'Which cuisine is it?', 'choices': CHOICES, 'answer': '1', 'food_meta': meta})
    (folder / 'sivqa_tidy.json').write_text(json.dumps(items), encoding='utf-8')
    guide = (ROOT / 'docs/food_qa.md').read_text(encoding='utf-8')
    here = Path.cwd()
    os.chdir(root)
    try:
        exec(compile(re.search(r'```python run\n(.*?)```', guide, re.DOTALL)[1], 'docs/food_qa.md', 'exec'), {})
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(scope='module')
def base(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint in the original layout, with code that must stay code."""
    made = tiny_model('internvl_chat')
    folder = tmp_path_factory.mktemp('base') / 'InternVL2-tiny'
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / 'modeling_internvl_chat.py').write_text('raise SystemExit("run")')
    return folder


@pytest.fixture(scope='module')
def run(food, base, tmp_path_factory) -> Path:
    """The work dir of a run that was stopped after one step and resumed; LoRA learns the prompt's answer."""
    work_dir, image = tmp_path_factory.mktemp('run'), str(food / 'images/0.png')
    options = [
        *('--cfg-options', f'pretrained_model_name_or_path={base}', f'data_root={food}', 'dtype=float32', 'lr=0.005'),
        *(f'evaluation_images={[image, image]}', 'param_scheduler=[]', 'accumulative_counts=1', 'lora_dropout=0'),
        *('dataloader_num_workers=0', 'custom_hooks.1.max_new_tokens=2', 'tune.vision_encoder=lora'),
        *('tune.projector=full', 'plan_cache_dir=None'),
    ]
    assert main(['train', NAME, '--work-dir', str(work_dir), *options, 'max_epochs=1']) == 0
    assert (work_dir / 'iter_1.pth').is_dir()
    assert main(['train', NAME, '--work-dir', str(work_dir), '--resume', *options, f'max_epochs={STEPS}']) == 0
    return work_dir


@pytest.fixture(scope='module')
def merged(run, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('export')
    adapter, out = folder / 'adapter', folder / 'merged'
    assert main(['convert', 'pth_to_hf', NAME, str(run / f'iter_{STEPS}.pth'), str(adapter)]) == 0
    assert main(['convert', 'merge', str(base), str(adapter), str(out), '--format', 'original']) == 0
    return out


def test_the_rows_are_those_of_the_guide(food):
    parts = {part: json.loads((food / f'{part}.json').read_text(encoding='utf-8')) for part in ('train', 'test')}
    assert len(parts['train']) + len(parts['test']) == len(DISHES)
    assert parts['train']
    for row in parts['train'] + parts['test']:
        assert row['image'].startswith('images/')
        assert [turn['value'] for turn in row['conversations']] == ['<image>\n' + QUESTION, 'B. Canton']


def test_its_questions_are_asked_as_in_the_rows():
    assert load_config(NAME).evaluation_inputs[0].count('\n') == len(CHOICES)


def test_the_picture_it_asks_about_is_the_one_of_the_guide():
    guide = (ROOT / 'docs/food_qa.md').read_text(encoding='utf-8')
    file = re.search(r'"food_file": "(.*?)"', guide)[1]
    assert set(load_config(NAME).evaluation_images) == {f'data/FoodieQA/{file}'}


def test_the_answer_is_learned_and_the_export_gives_it(merged, base, food, capsys):
    """The export lies as the base does, and holds its code, unchanged and never run."""
    assert find_layout(str(merged)) is find_layout(str(base))
    assert (merged / 'modeling_internvl_chat.py').read_bytes() == (base / 'modeling_internvl_chat.py').read_bytes()
    assert (merged / 'config.json').read_bytes() == (base / 'config.json').read_bytes()
    old, new = open_weights(base), open_weights(merged)
    assert [(n, w.shape, w.dtype) for n, w in old.items()] == [(n, w.shape, w.dtype) for n, w in new.items()]
    moved = {name.split('.')[0] for name in old if not torch.equal(old[name].read(), new[name].read())}
    assert moved == {'vision_model', 'mlp1', 'language_model'}
    image = str(food / 'images' / '1.png')
    capsys.readouterr()
    assert main(['chat', str(merged), '--image', image, '--prompt', QUESTION, '--max-new-tokens', '12']) == 0
    assert capsys.readouterr().out == 'B. Canton\n'


def test_four_bits(base):
    """QLoRA's base: the linear layers of the language model, of which the fused ones are split first."""
    model, _ = load_model(str(base), dtype=torch.float32, quantization='nf4')
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds['model.language_model.layers.0.self_attn.k_proj'] == 'Linear4bit'
    assert kinds['model.vision_tower.encoder.layer.0.attention.k_proj'] == 'Linear'
    assert kinds['lm_head'] == 'Linear'
