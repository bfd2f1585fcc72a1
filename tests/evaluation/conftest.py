import json

import pytest
import torch
from PIL import Image

from tests.evaluation.watched import talk
from vlmtune.data import Processor
from vlmtune.models import load_model


@pytest.fixture(scope='module')
def loaded(tiny_model):
    path = str(tiny_model('qwen2_5_vl', amplify=4.0))
    return load_model(path, dtype=torch.float32)[0].eval(), Processor(path)


@pytest.fixture
def folder(tmp_path):
    """Four questions about pictures of several sizes, three without."""
    for number, size in enumerate([(60, 40), (40, 90), (120, 60), (56, 56)]):
        Image.new('RGB', size, (60 * number, 200, 20)).save(tmp_path / f'{number}.png')
    rows = []
    for number in range(4):
        rows.append(talk(f'<image>\nWhat is in picture {number}?', f'thing {number}', image=f'{number}.png'))
        if number:
            rows.append(talk(f'Why {"so " * number}?', 'because'))
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path
