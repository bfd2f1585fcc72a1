"""Recipes written into a temporary folder, with the few classes they name beside them."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PARTS = """
from dataclasses import dataclass


@dataclass
class LoraSettings:
    r: int = 8
    alpha: float = 16


class Model:
    def __init__(self, path, *, tune, lora: LoraSettings | None = None, dtype='float32'):
        pass


class Base:
    def __init__(self, priority=1, every_n_iters=1):
        pass


class Hook(Base):
    def __init__(self, *, images=(), **kwargs):
        super().__init__(**kwargs)


class Optimizer:
    def __init__(self, params, lr, betas=(0.9, 0.999)):
        pass

    @classmethod
    def from_name(cls, name):
        return cls


class Constructor:
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass


class Loop:
    def __init__(self, runner, dataloader, *, max_epochs, accumulative_counts=1):
        pass


class Dataset:
    def __init__(self, rows, *, processor, map_fn, max_length):
        pass


class Tracker:
    def __init__(self, name, save_dir, init_kwargs=None):
        pass


def load_rows(path, split='train'):
    return []


def map_fn(row, *, answer):
    return row
"""

RECIPE = """
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from PARTS import Dataset, Hook, Loop, Model, Optimizer, load_rows, map_fn

# PART 1
pretrained_model_name_or_path = 'some/model'
data_root = 'data/mix'
data_path = data_root + '/train.json'
max_length = 128
tune = dict(vision_encoder='frozen', llm='lora')
lora_r = 8
batch_size = 2
accumulative_counts = 4
max_epochs = 2
optim_type = Optimizer
lr = 2e-4
warmup_ratio = 0.25
save_steps = 50
evaluation_inputs = ['what is this?']

# PART 2
model = dict(type=Model, path=pretrained_model_name_or_path, tune=tune, lora=dict(r=lora_r, alpha=2 * lora_r))

# PART 3
train_dataset = dict(
    type=Dataset,
    rows=dict(type=load_rows, path=data_path),
    map_fn=dict(type=map_fn, answer='yes'),
    max_length=max_length,
)
train_dataloader = dict(dataset=train_dataset, batch_size=batch_size)

# PART 4
optim_wrapper = dict(optimizer=dict(type=optim_type, lr=lr))
warmup_end = warmup_ratio * max_epochs
train_cfg = dict(type=Loop, max_epochs=max_epochs, accumulative_counts=accumulative_counts)

# PART 5
default_hooks.checkpoint.interval = save_steps
custom_hooks = [dict(type=Hook, every_n_iters=10 * i, images=evaluation_inputs) for i in (1, 2)]
experiment_name = f'{data_root}-{lr}-{warmup_end}'
"""


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[str]:
    """The name of a module of the user's that lies beside the recipes of this test."""
    name = f'parts_{abs(hash(str(tmp_path)))}'
    (tmp_path / f'{name}.py').write_text(PARTS)
    path, modules = list(sys.path), set(sys.modules)
    yield name
    sys.path[:] = path
    for new in set(sys.modules) - modules:
        if getattr(sys.modules[new], '__file__', None) and str(tmp_path) in str(sys.modules[new].__file__):
            del sys.modules[new]


@pytest.fixture
def write(tmp_path: Path, parts: str) -> Callable[..., Path]:
    """``write(text, name)`` puts a recipe into the test's folder."""

    def write_recipe(text: str = RECIPE, name: str = 'recipe.py') -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).replace('PARTS', parts))
        return path

    return write_recipe


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Path:
    return write(RECIPE)


@pytest.fixture
def edit(write: Callable[..., Path]) -> Callable[..., Path]:
    """``edit('lr = 2e-4', 'lr = 1')`` writes the recipe with one line changed; ``edit('', more)`` appends."""

    def write_edited(old: str, new: str, name: str = 'recipe.py') -> Path:
        assert old in RECIPE
        return write(RECIPE.replace(old, new, 1) if old else RECIPE + new, name)

    return write_edited
