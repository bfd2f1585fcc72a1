"""One step learns the same however its samples fall into micro-batches, also where their answers differ in length.

The first answer has 100 times the learned tokens of the others: averaging the means of micro-batches would be far off.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.apps.train import prepare_config
from vlmtune.engine.build import build_data, build_model
from vlmtune.structures import IGNORE_INDEX

ANSWERS = ['x' * 420, 'no', 'no', 'no']  # a letter is a token; one more closes the turn
IN_ORDER = dict(pack_to_max_length=False, shuffle=False, max_length=1000, lora_dropout=0.0)


@pytest.fixture
def recipe(tiny_data, tmp_path):
    """What to write into a recipe: four rows, two of them with an image."""
    data = tiny_data('llava', rows=4)
    shown = [row['image'] for row in json.loads(data.data_path.read_text()) if isinstance(row.get('image'), str)][:1]
    rows = []
    for number, answer in enumerate(ANSWERS):
        mark = '<image>\n' if number < 2 else ''
        turns = [{'from': 'human', 'value': f'{mark}What is it?'}, {'from': 'gpt', 'value': answer}]
        rows.append({'conversations': turns, **({'image': shown[0]} if mark else {})})
    path = tmp_path / 'uneven.json'
    path.write_text(json.dumps(rows))
    return dict(data=path, images=data.image_folder, optimizer='SGD')


def gradients_of(write_recipe, tmp_path, recipe, **overrides):
    """The gradients of one optimizer step, and the learned tokens of its micro-batches."""
    write_recipe(tmp_path / 'recipe.py', **recipe)
    cfg = prepare_config(str(tmp_path / 'recipe.py'), overrides={**IN_ORDER, **overrides})
    torch.manual_seed(0)  # of the LoRA weights
    processor, loader = build_data(cfg)
    model = build_model(cfg, processor=processor).train()
    for name, parameter in model.named_trainable().items():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.05)  # at zero, half of the gradients are zero
    batches = list(loader)
    counts = [int((batch['labels'][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    for batch in batches:
        (model(**batch) / sum(counts)).backward()
    return {name: p.grad for name, p in model.named_trainable().items()}, counts


def test_accumulated_gradients_are_those_of_one_batch(write_recipe, tmp_path, recipe):
    """1e-5 of the largest gradient: float32 sums in another order."""
    one, all_at_once = gradients_of(write_recipe, tmp_path, recipe, batch_size=4, accumulative_counts=1)
    four, apart = gradients_of(write_recipe, tmp_path, recipe, batch_size=1, accumulative_counts=4)
    assert len(all_at_once) == 1
    assert len(apart) == 4
    assert max(apart) >= 100 * min(apart)
    largest = max(grad.abs().max() for grad in one.values())
    assert largest > 0.01
    for name, grad in one.items():
        assert (four[name] - grad).abs().max() < 1e-5 * largest, name


def test_one_step_of_sgd_ends_at_the_same_weights(run, recipe):
    settings = dict(recipe=recipe, max_norm=1e9, lr=0.5, max_steps=1, max_epochs=None, **IN_ORDER)
    one = run('one', batch_size=4, accumulative_counts=1, **settings)
    four = run('four', batch_size=1, accumulative_counts=4, **settings)
    start = run('start', batch_size=4, accumulative_counts=1, **{**settings, 'lr': 0.0})
    weights = [load_file(path / 'iter_1.pth' / 'model.safetensors') for path in (one, four, start)]
    moved = max((weights[0][name] - weights[2][name]).abs().max() for name in weights[0])
    apart = max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0])
    assert moved > 1e-3
    assert apart < 1e-6
