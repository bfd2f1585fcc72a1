"""A config over a data set, and what check-data says of it."""

import json

import pytest

from vlmtune.cli import main

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
