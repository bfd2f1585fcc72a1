"""Whole runs in this process: a recipe over a tiny model and a tiny data set, through ``vlmtune.apps.train``."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlmtune.apps.train import train
from vlmtune.engine.manifest import MANIFEST

RECIPE = """# vlmtune train recipe
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import SGD, AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = '{model}'
prompt_template = {template!r}
data_path = '{data}'
image_folder = '{images}'
max_length = 96
pack_to_max_length = True
shuffle = True
tune = {tune}
lora_r = 4
lora_dropout = 0.1
batch_size = 1
accumulative_counts = 2
dataloader_num_workers = 0
max_epochs = 2
max_steps = None
lr = 1e-2
max_norm = 1.0
horizon = 2
seed = 7
save_steps = 1000
save_total_limit = -1
save_optimizer = True
evaluation_freq = None
evaluation_inputs = {questions}
evaluation_images = {pictures}

processor = dict(
    type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path, prompt_template=prompt_template)
model = dict(type=SupervisedFinetune, pretrained_model_name_or_path=pretrained_model_name_or_path, tune=tune,
             lora=dict(r=lora_r, alpha=8, dropout=lora_dropout), dtype='float32')
train_dataloader = dict(
    dataset=dict(type=SupervisedDataset, rows=dict(type=load_rows, path=data_path),
                 dataset_map_fn=dict(type=llava_map_fn), template_map_fn=dict(type=chat_template_map_fn),
                 image_folder=image_folder, max_length=max_length),
    batch_size=batch_size, num_workers=dataloader_num_workers, pack_to_max_length=pack_to_max_length, shuffle=shuffle)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type={optimizer}, lr=lr), clip_grad=dict(max_norm=max_norm))
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=True, begin=0, end=0.1 * horizon, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=0.1 * horizon, end=horizon,
         convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs, max_steps=max_steps, accumulative_counts=accumulative_counts)
default_hooks.checkpoint.interval = save_steps
default_hooks.checkpoint.max_keep_ckpts = save_total_limit
default_hooks.checkpoint.save_optimizer = save_optimizer
default_hooks.logger.interval = 1
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq,
                inputs=evaluation_inputs, images=evaluation_images, max_new_tokens=4,
                generation={generation})]
experiment_name = '{name}'
plan_cache_dir = None
randomness = dict(seed=seed)
"""
VALIDATION = """
from vlmtune.engine import EarlyStoppingHook, ValLoop
from vlmtune.evaluation import cer, exact_match
val_data_path = '{held_out}'
val_interval = 2
at_start = False
save_best = None
val_dataset = dict(train_dataloader['dataset'], rows=dict(type=load_rows, path=val_data_path))
val_dataloader = dict(dataset=val_dataset, batch_size=2)
val_evaluator = dict(metrics=[dict(type=exact_match), dict(type=cer)], generation=dict(max_new_tokens=3))
val_cfg = dict(type=ValLoop, interval=val_interval, at_start=at_start)
default_hooks.checkpoint.save_best = save_best
"""
_NUMBERS = count()  # mmengine keeps the scalars of runs by name: two runs of one second must not meet


@pytest.fixture(scope='session')
def write_recipe(tiny_model, tiny_data) -> Callable[..., Path]:
    """``write_recipe(tmp_path / 'recipe.py', tune=...)``: 17 rows, 10 packs of 96 tokens, so 5 steps an epoch."""

    def write(path: Path, **changes: Any) -> Path:
        data = tiny_data('llava', rows=17)
        values = dict(
            model=tiny_model('llava'),
            template='vicuna',
            data=data.data_path,
            images=data.image_folder,
            tune=dict(projector='full', llm='lora'),
            optimizer='AdamW',
            questions=[],
            generation={},
            pictures=None,
            name=f'run{next(_NUMBERS)}',
        )
        path.write_text(RECIPE.format(**{**values, **changes}))
        return path

    return write


@pytest.fixture
def run(write_recipe, tmp_path) -> Callable[..., Path]:
    """``run('a', lr=1e-3)``: trains into ``tmp_path / 'a'`` with these settings changed; returns the work dir.

    ``recipe`` changes the text of the recipe, ``resume`` is the command line's.
    """

    def go(name: str, *, recipe: dict[str, Any] | None = None, resume: bool | str = False, **overrides: Any) -> Path:
        work_dir = tmp_path / name
        path = write_recipe(tmp_path / 'recipe.py', **(recipe or {}))
        train(str(path), work_dir=str(work_dir), resume=resume, overrides=overrides)
        return work_dir

    return go


@pytest.fixture
def start_from(run) -> Callable[..., dict[str, torch.Tensor]]:
    """``start_from('name', path, tune=...)``: the weights with which a run begins that loads ``path``."""

    def go(name: str, path: Path, *, tune: dict[str, str] | None = None, **overrides: Any) -> dict[str, torch.Tensor]:
        still = dict(lr=0.0, max_epochs=None, max_steps=1, horizon=1, save_steps=1, load_from=str(path))
        work_dir = run(name, recipe=dict(tune=tune) if tune else None, **{**still, **overrides})
        assert not (work_dir / 'load_from.safetensors.tmp').exists()
        return load_file(work_dir / 'iter_1.pth' / 'model.safetensors')

    return go


@pytest.fixture(scope='session')
def held_out(tiny_data, tmp_path_factory) -> Path:
    """Six rows of the data that is learned."""
    rows = json.loads(tiny_data('llava', rows=17).data_path.read_text())
    path = tmp_path_factory.mktemp('held_out') / 'data.json'
    path.write_text(json.dumps(rows[:6]))
    return path


@pytest.fixture(scope='session')
def write_validated(write_recipe, held_out, tmp_path_factory) -> Callable[..., Path]:
    """``write_validated('name', more='...', tune=...)``: the recipe, with a validation every second step.

    ``more`` is added to its text; it may import ``validation_hooks``.
    """
    folder = tmp_path_factory.mktemp('recipes')
    shutil.copy(Path(__file__).with_name('validation_hooks.py'), folder)

    def write(name: str, *, more: str = '', **changes: Any) -> Path:
        path: Path = write_recipe(folder / f'{name}.py', **changes)
        path.write_text(path.read_text() + VALIDATION.format(held_out=held_out) + more)
        return path

    return write


@pytest.fixture
def validated(write_validated, tmp_path) -> Callable[..., Path]:
    """As ``run``, with a validation."""

    def go(name: str, *, more: str = '', resume: bool | str = False, **overrides: Any) -> Path:
        path = write_validated(f'{tmp_path.name}_{name}', more=more)
        train(str(path), work_dir=str(tmp_path / name), resume=resume, overrides=overrides)
        return tmp_path / name

    return go


@pytest.fixture(scope='session')
def train_in_ranks(warm_ranks) -> Callable[..., None]:
    """``train_in_ranks(2, 'recipe.py', work_dir='a', deepspeed='zero2')``: ``train`` in so many fresh processes."""

    def go(world_size: int, config: Path, **arguments: Any) -> None:
        ended = warm_ranks.run(world_size, config=config, **arguments)
        assert ended.codes == [0] * world_size, '\n'.join([str(ended.codes), *(text[-3000:] for text in ended.said)])

    return go


_CLOCKS = ('time', 'per_second', 'tflops', 'memory')


@pytest.fixture(scope='session')
def contents() -> Callable[[Path], dict[str, Any]]:
    """What a checkpoint holds, but for clocks: weights, optimizer, trainer state, random generators."""

    def read(checkpoint: Path) -> dict[str, Any]:
        trainer = json.loads((checkpoint / 'trainer.json').read_text())
        messages = {k: v for k, v in trainer.pop('messages').items() if not any(clock in k for clock in _CLOCKS)}
        assert 'train/loss' in messages
        return dict(
            weights={k: v.clone() for k, v in load_file(checkpoint / 'model.safetensors').items()},  # not mapped
            optimizer={path.name: _optimizer(path) for path in sorted(checkpoint.glob('optimizer_*.safetensors'))},
            trainer=trainer,
            messages=messages,
            rng={path.name: json.loads(path.read_text()) for path in sorted(checkpoint.glob('rng_*.json'))},
        )

    return read


def _optimizer(path: Path) -> dict[str, Any]:
    with safe_open(path, framework='pt') as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
        return dict(tensors=tensors, numbers=json.loads(file.metadata()['optimizer']))


@pytest.fixture(scope='session')
def losses() -> Callable[[Path], list[float]]:
    """The loss of every step that a checkpoint remembers."""

    def read(checkpoint: Path) -> list[float]:
        return json.loads((checkpoint / 'trainer.json').read_text())['messages']['train/loss']['values']

    return read


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in _differences(a[key], b[key], f'{path}.{key}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in _differences(x, y, f'{path}[{i}]')
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path if isinstance(a, torch.Tensor) else f'{path}: {a} is not {b}']


@pytest.fixture(scope='session')
def differences() -> Callable[[Any, Any], list[str]]:
    """Where two nested structures of tensors and numbers are not equal to the bit."""
    return lambda a, b: _differences(a, b, '')


def _change_a_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:50] + b'X' + data[51:])


_DAMAGES: dict[str, Callable[[Path], object]] = {
    'missing': lambda checkpoint: (checkpoint / 'trainer.json').unlink(),
    'changed': lambda checkpoint: _change_a_byte(checkpoint / 'model.safetensors'),
    'truncated': lambda checkpoint: os.truncate(checkpoint / 'model.safetensors', 5),
    'no manifest': lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    'half manifest': lambda checkpoint: os.truncate(checkpoint / MANIFEST, 30),
}


@pytest.fixture(scope='session')
def damage() -> Callable[[Path, str], None]:
    """``damage(checkpoint, 'truncated')``: one file of it is no longer what was written."""

    def do(checkpoint: Path, kind: str) -> None:
        _DAMAGES[kind](checkpoint)

    return do
