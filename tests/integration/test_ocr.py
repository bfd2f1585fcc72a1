"""Pages to Markdown with tokens of its own, from the rows of docs/ocr.md to an answer, through the command line."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmtune.cli import main
from vlmtune.config import load_config

ROOT = Path(__file__).resolve().parents[2]
NAME = 'qwen2_vl_2b_lora_ocr'
OCR = {'qwen2_vl_2b_lora_ocr': 28, 'qwen2_vl_7b_lora_ocr': 28, 'qwen2_5_vl_7b_lora_ocr': 28, 'qwen3_vl_4b_lora_ocr': 32}
"""{recipe: pixels to a side of an image token}."""

QUESTION = 'Transcribe this page as Markdown.'
ANSWER = '<table_begin>a<cell>b<row>c<cell>d<table_end>'
TOKENS = ['<table_begin>', '<table_end>', '<cell>', '<row>']
STEPS = 40


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> Path:
    """Two pages, their transcripts, and the rows that the program of the guide makes of them."""
    root = tmp_path_factory.mktemp('ocr')
    images = root / 'data' / 'pages' / 'images'
    images.mkdir(parents=True)
    for number in (1, 2):
        page = Image.new('RGB', (90, 120), 'white')
        ImageDraw.Draw(page).text((10, 10), 'a b\nc d', fill='black')
        page.save(images / f'report-{number}.png')
        (images / f'report-{number}.md').write_text(ANSWER + '\n', encoding='utf-8')
    guide = (ROOT / 'docs' / 'ocr.md').read_text(encoding='utf-8')
    program = re.search(r'```python run\n(import json.*?)```', guide, re.DOTALL)
    here = Path.cwd()
    os.chdir(root)
    try:
        exec(compile(program[1], 'docs/ocr.md', 'exec'), {})
    finally:
        os.chdir(here)
    return root / 'data' / 'pages'


def options(base: Path, pages: Path, *, epochs: int) -> list[str]:
    """Of a tiny run; the schedule is left out so that a resumed run can go on for longer."""
    settings = dict(
        pretrained_model_name_or_path=base,
        data_root=pages,
        evaluation_images=[str(pages / 'images' / 'report-1.png')] * 2,
        max_epochs=epochs,
        lr=0.005,
        lora_dropout=0,
        dtype='float32',
        accumulative_counts=1,
        dataloader_num_workers=0,
        param_scheduler=[],
        plan_cache_dir=None,
    )
    return ['--cfg-options', 'custom_hooks.1.max_new_tokens=2', *(f'{key}={value}' for key, value in settings.items())]


@pytest.fixture(scope='module')
def run(pages, tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """The base model, and the work dir of a run that was stopped after one step and resumed."""
    base, work_dir = tiny_model('qwen2_vl'), tmp_path_factory.mktemp('run')
    assert main(['train', NAME, '--work-dir', str(work_dir), *options(base, pages, epochs=1)]) == 0
    assert (work_dir / 'iter_1.pth').is_dir()
    assert main(['train', NAME, '--work-dir', str(work_dir), '--resume', *options(base, pages, epochs=STEPS)]) == 0
    return base, work_dir


@pytest.fixture(scope='module')
def merged(run, tmp_path_factory) -> tuple[Path, Path]:
    base, work_dir = run
    folder = tmp_path_factory.mktemp('export')
    adapter, out = folder / 'adapter', folder / 'merged'
    assert main(['convert', 'pth_to_hf', NAME, str(work_dir / f'iter_{STEPS}.pth'), str(adapter)]) == 0
    assert main(['convert', 'merge', str(base), str(adapter), str(out)]) == 0
    return adapter, out


def test_the_rows_are_those_of_the_guide(pages):
    rows = [json.loads(line) for line in (pages / 'train.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [row['images'] for row in rows] == [['report-1.png'], ['report-2.png']]
    assert all(row['messages'][1] == {'role': 'assistant', 'content': ANSWER} for row in rows)
    assert all(row['messages'][0]['content'][1]['text'] == QUESTION for row in rows)


def test_the_marks_are_learned_and_shown(merged, pages, capsys):
    adapter, out = merged
    asked = ['--image', str(pages / 'images' / 'report-1.png'), '--prompt', QUESTION, '--max-new-tokens', '20']
    for model in (out, adapter):
        capsys.readouterr()
        assert main(['chat', str(model), *asked]) == 0
        assert capsys.readouterr().out == ANSWER + '\n'


def test_other_programs_find_the_marks_and_their_weights(run, merged):
    base = AutoModelForImageTextToText.from_pretrained(run[0])
    tokenizer, model = AutoTokenizer.from_pretrained(merged[1]), AutoModelForImageTextToText.from_pretrained(merged[1])
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert tokenizer(ANSWER)['input_ids'][0] == ids[0]
    assert tokenizer.decode(tokenizer(ANSWER)['input_ids'], skip_special_tokens=True) == ANSWER
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows >= max(ids) + 1
    old = base.get_input_embeddings().weight
    for weights in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        moved = [row for row in ids if row >= len(old) or not torch.equal(weights[row], old[row])]
        assert moved == ids


@pytest.mark.parametrize('name', OCR)
@pytest.mark.parametrize('size', [(1191, 1684), (1684, 1191), (1224, 1584), (1584, 1224)])
def test_no_page_of_the_usual_sizes_is_shrunk(name, size):
    limit, side = load_config(name).max_pixels, OCR[name]
    free, limited = (
        smart_resize(*size, factor=side, min_pixels=side * side, max_pixels=most) for most in (10**9, limit)
    )
    assert free == limited
    assert limited[0] * limited[1] <= limit
    text = (ROOT / 'docs' / 'ocr.md').read_text(encoding='utf-8')
    assert f'| {limited[0] * limited[1] // side**2} |' in text


@pytest.mark.parametrize(
    ('tune', 'tie', 'frozen'),
    [
        ("dict(llm='lora', embeddings='frozen', lm_head='frozen')", True, 'embeddings'),
        ("dict(llm='lora', embeddings='full', lm_head='frozen')", False, 'lm_head'),
    ],
)
def test_marks_whose_rows_would_stay_noise_are_refused(tune, tie, frozen, pages, tiny_model, tmp_path, capsys):
    """Before any weight is read: there are none."""
    base = tmp_path / 'base'
    shutil.copytree(
        tiny_model('qwen2_vl', tie_word_embeddings=tie), base, ignore=shutil.ignore_patterns('*.safetensors')
    )
    run = ['train', NAME, '--work-dir', str(tmp_path / 'run'), *options(base, pages, epochs=1), f'tune={tune}']
    assert main(run) == 1
    said = capsys.readouterr().err
    assert f"'<table_begin>' is new to the model, and tune {frozen} is frozen" in said
    assert 'new tokens need embeddings that train' in said
