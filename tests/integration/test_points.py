"""POINTS-Reader from rows with parts and an image column to an answer with examples, through the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from vlmtune.cli import main

NAME = 'points_reader_3b_lora_ocr'
ANSWER = 'There are two shapes.'


@pytest.fixture(scope='module')
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages, the second asked about twice."""
    root = tmp_path_factory.mktemp('pages')
    rows = []
    for number in (1, 2):
        page = Image.new('RGB', (90, 120), 'white')
        ImageDraw.Draw(page).text((10, 10), f'page {number}', fill='black')
        page.save(root / f'page_{number}.png')
        content = [{'type': 'image', 'text': None, 'index': 0}, {'type': 'text', 'text': 'Read.', 'index': None}]
        turns = [
            {'role': 'user', 'content': content},
            {'role': 'assistant', 'content': [{'type': 'text', 'text': ANSWER}]},
        ]
        rows.append({'messages': turns * number, 'images': [f'page_{number}.png']})
    (root / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return root


def options(base: Path, pages: Path, *, epochs: int) -> list[str]:
    settings = dict(
        pretrained_model_name_or_path=base,
        data_root=pages,
        val_data_path=None,
        image_folder=pages,
        evaluation_images=[str(pages / 'page_1.png')],
        max_epochs=epochs,
        lr=0.003,
        lora_dropout=0,
        dtype='float32',
        accumulative_counts=1,
        dataloader_num_workers=0,
        param_scheduler=[],
        plan_cache_dir=None,
    )
    nested = ['custom_hooks.1.max_new_tokens=2', 'train_dataset.dataset_map_fn.turns=first']
    return ['--cfg-options', *nested, *(f'{key}={value}' for key, value in settings.items())]


def test_it_learns_is_resumed_and_merged_and_answers(
    pages: Path, tiny_model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    base, work_dir = tiny_model('points', amplify=4.0), tmp_path / 'work'
    train = ['train', NAME, '--work-dir', str(work_dir)]
    assert main([*train, *options(base, pages, epochs=1)]) == 0
    assert main([*train, '--resume', *options(base, pages, epochs=40)]) == 0
    adapter, merged = tmp_path / 'adapter', tmp_path / 'merged'
    assert main(['convert', 'pth_to_hf', NAME, str(work_dir / 'iter_40.pth'), str(adapter)]) == 0
    assert main(['convert', 'merge', str(base), str(adapter), str(merged)]) == 0

    before, after = load_file(base / 'model.safetensors'), load_file(merged / 'model.safetensors')
    changed = {name for name in before if not before[name].equal(after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith('.weight') and is_adapted(name)}
    assert '--chat-template points-v15-chat' in (merged / 'README.md').read_text()

    (tmp_path / 'page.md').write_text('A circle.', encoding='utf-8')
    example = ['--example', str(pages / 'page_2.png'), '', f'@{tmp_path / "page.md"}']
    answers = []
    for more in ([str(base), '--adapter', str(adapter)], [str(merged)], [str(base)], [str(base), *example]):
        capfd.readouterr()
        ask = ['--image', str(pages / 'page_1.png'), '--prompt', 'Read.', '--max-new-tokens', '12']
        assert main(['chat', *more, *ask]) == 0
        answers.append(capfd.readouterr().out.strip())
    assert answers[0] == answers[1] == ANSWER
    assert answers[2] not in (ANSWER, answers[3])  # the example was seen


def is_adapted(name: str) -> bool:
    """Linear layers of the language model and of the projector."""
    return '_proj.' in name or name.startswith('vision_projector.mlp.')
