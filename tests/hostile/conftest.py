"""What a hostile file may do: be refused by one line, soon, in little memory, and without running what it names."""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlmtune.utils.errors import UserError

RECIPE = """# a recipe over {model}
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import OptimWrapper
from torch.optim import SGD

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import TrainLoop
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = {model!r}
data_path = {data!r}
image_folder = {images!r}
max_length = 128
tune = dict(llm='full')
lr = 0.0
max_steps = 1
processor = dict(type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(type=SupervisedFinetune, pretrained_model_name_or_path=pretrained_model_name_or_path, tune=tune,
             dtype='float32')
train_dataloader = dict(
    dataset=dict(type=SupervisedDataset, rows=dict(type=load_rows, path=data_path),
                 dataset_map_fn=dict(type=llava_map_fn), template_map_fn=dict(type=chat_template_map_fn),
                 image_folder=image_folder, max_length=max_length),
    batch_size=1, num_workers=0, pack_to_max_length=False)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=lr))
param_scheduler = None
train_cfg = dict(type=TrainLoop, max_epochs=None, max_steps=max_steps, accumulative_counts=1)
default_hooks.checkpoint.interval = 1
plan_cache_dir = None
randomness = dict(seed=1)
{more}
"""


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that only code of a hostile file would make."""
    return tmp_path / 'MARK'


@pytest.fixture
def touch(mark) -> str:
    """The command that makes it."""
    return f'touch {mark}'


def memory() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def bounded(mark) -> Callable[..., Any]:
    """``with bounded():`` what is inside makes no mark, takes no more than 10 s and little memory."""

    @contextmanager
    def check(seconds: float = 10.0, mebibytes: float = 400.0) -> Iterator[None]:
        began, before = time.process_time(), memory()
        yield
        assert time.process_time() - began < seconds
        assert memory() - before < mebibytes * 1024
        assert not mark.exists()

    return check


@pytest.fixture
def refused(bounded) -> Callable[..., Any]:
    """``with refused('message'):`` what is inside is refused by one line, and see ``bounded``."""

    @contextmanager
    def check(match: str | None = None, error: type[Exception] = UserError) -> Iterator[None]:
        with bounded(), pytest.raises(error, match=match) as caught:
            yield
        assert '\n' not in str(caught.value)
        assert len(str(caught.value)) < 900

    return check


@pytest.fixture
def harmless(bounded) -> Callable[..., Any]:
    """``with harmless():`` what is inside works or is refused by one line, and see ``bounded``."""

    @contextmanager
    def check() -> Iterator[None]:
        message = ''
        with bounded():
            try:
                yield
            except UserError as error:
                message = str(error)
        assert '\n' not in message

    return check


@pytest.fixture
def recipe(tmp_path, tiny_model) -> Callable[..., str]:
    """``recipe(data=..., model=...)``: the path of a config over a text model and two rows."""

    def write(**changes: Any) -> str:
        rows = [{'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}] * 2
        data = tmp_path / 'rows.json'
        data.write_text(json.dumps(rows))
        values = dict(model=str(tiny_model('qwen2')), data=str(data), images=None, more='')
        values |= {name: os.fspath(value) if isinstance(value, Path) else value for name, value in changes.items()}
        path = tmp_path / 'recipe.py'
        path.write_text(RECIPE.format(**values))
        return str(path)

    return write
