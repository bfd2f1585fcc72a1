"""One process with K micro-batches a step and K processes with one learn the same.

SGD tells: one step at a learning rate of 1024 is the gradient, and after 20 small ones weights show a wrong factor,
which clipping and AdamW would hide. Ranks hold what is hardest to share: 200 times as many learned tokens as the other,
text alone beside images, and at the end of every epoch nothing at all.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

FULL = dict(vision_encoder='full', projector='full', llm='full')
LORA = dict(projector='full', llm='lora')
PADDED = {'pack_to_max_length': False, 'shuffle': False, 'max_length': 1000}
PACKED = {'pack_to_max_length': True, 'max_length': 96, 'model.gradient_checkpointing': True}
QLORA = {**PACKED, 'model.quantization': 'nf4'}
STEPS, LR, HUGE = 20, 0.01, 1024.0
EXACT = dict(lora_dropout=0.0, max_norm=1e9, max_epochs=None)


@pytest.fixture(scope='module')
def uneven(tiny_data, tmp_path_factory):
    """9 rows, with an image and without in turn; the first answer is long."""
    shown = sorted(path.name for path in tiny_data('llava', rows=33).image_folder.iterdir())
    rows = []
    for number in range(9):
        image = {} if number % 2 else {'image': shown[number]}
        question, answer = '<image>\nWhat is it?' if image else f'What is {number}?', 'no' if number else 'x' * 420
        talk = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
        rows.append({'conversations': talk, **image})
    path = tmp_path_factory.mktemp('rows') / 'uneven.json'
    path.write_text(json.dumps(rows))
    return path


class Way:
    """One way of running: so many ranks, a strategy, settings.

    Args:
        train: ``train(work_dir, lr=..., max_steps=...)``.
        folder: of the work dirs.
    """

    def __init__(self, train, folder):
        self.train, self.folder = train, folder

    def after(self, *, lr, max_steps):
        """The checkpoint of a run; made once."""
        work_dir = self.folder / f'{lr}'
        if not work_dir.exists():
            self.train(work_dir=work_dir, lr=lr, max_steps=max_steps)
        return work_dir / f'iter_{max_steps}.pth'

    def weights(self, *, lr, max_steps):
        return load_file(self.after(lr=lr, max_steps=max_steps) / 'model.safetensors')

    def gradients(self, start):
        """Of the first step, float64 by name."""
        ahead = self.weights(lr=HUGE, max_steps=1)
        return {name: (weight.double() - ahead[name].double()) / HUGE for name, weight in start.items()}

    def series(self, name):
        """A logged number of every small step."""
        trainer = json.loads((self.after(lr=LR, max_steps=STEPS) / 'trainer.json').read_text())
        return torch.tensor(trainer['messages'][f'train/{name}']['values'])


@pytest.fixture(scope='module')
def way(train_in_ranks, write_recipe, tiny_data, uneven, tmp_path_factory):
    """``way(2, 'zero2', micro_batches=4, recipe=dict(tune=...), ...)``; made once. micro_batches: of a step, in all."""

    def train(world_size, deepspeed, micro_batches, recipe, work_dir, **overrides):
        data = tiny_data('llava', rows=33)
        values = dict(data=data.data_path, images=data.image_folder, optimizer='SGD')
        path = write_recipe(work_dir.with_suffix('.py'), **{**values, **recipe})
        path.write_text(path.read_text() + 'param_scheduler = None\n')
        settings = {**EXACT, 'accumulative_counts': micro_batches // world_size, **overrides}
        train_in_ranks(world_size, path, work_dir=work_dir, deepspeed=deepspeed, overrides=settings)

    known = {}

    def go(world_size, deepspeed=None, *, micro_batches, recipe, **overrides):
        run = (train, world_size, deepspeed, micro_batches, recipe)
        key = repr((run, overrides))
        if key not in known:
            known[key] = Way(functools.partial(*run, **overrides), tmp_path_factory.mktemp('way'))
        return known[key]

    return go


def assert_equal(one, several):
    """Gradients within 1e-5 of each tensor's, norms and losses of all steps within 1e-5, weights within 1e-6."""
    start = one.weights(lr=0.0, max_steps=1)
    expected, gradients = one.gradients(start), several.gradients(start)
    largest = max(grad.norm() for grad in expected.values())
    assert largest > 0.1
    assert gradients.keys() == expected.keys()
    for name, grad in expected.items():  # of some the true gradient is 0: keys' biases
        assert (gradients[name] - grad).norm() <= 1e-5 * grad.norm().clamp(min=1e-6 * largest), name
    for name in ('grad_norm', 'loss'):
        assert len(one.series(name)) == len(several.series(name)) == STEPS
        torch.testing.assert_close(several.series(name), one.series(name), rtol=1e-5, atol=0)
    assert apart(one.weights(lr=LR, max_steps=STEPS), start) > 0.01
    assert apart(one.weights(lr=LR, max_steps=STEPS), several.weights(lr=LR, max_steps=STEPS)) < 1e-6


def apart(one, other):
    return max((weight - other[name]).abs().max().item() for name, weight in one.items())


def strategies(*names, slow=()):
    return pytest.mark.parametrize(
        'deepspeed',
        [
            pytest.param(name if name != 'ddp' else None, id=name, marks=[pytest.mark.slow] if name in slow else [])
            for name in names
        ],
    )


@strategies('ddp', 'zero1', 'zero2', 'zero3', slow=('zero1',))
def test_everything_trained_on_uneven_ranks(deepspeed, way, uneven):
    """No packing; one rank has all images and nearly all learned tokens, the other a filler at the end of an epoch."""
    settings = dict(micro_batches=2, recipe=dict(tune=FULL, data=uneven), **PADDED)
    assert_equal(way(1, **settings), way(2, deepspeed, **settings))


@strategies('ddp', 'zero1', 'zero2', 'zero3', slow=('ddp', 'zero1', 'zero3'))
def test_lora_with_packing_accumulation_and_checkpointing(deepspeed, way):
    settings = dict(micro_batches=4, recipe=dict(tune=LORA), **PACKED)
    assert_equal(way(1, **settings), way(2, deepspeed, **settings))


def test_one_micro_batch_of_two_rows(way, uneven):
    """The reference itself is no mean of the means of its micro-batches."""
    settings = dict(recipe=dict(tune=FULL, data=uneven), **PADDED)
    assert_equal(way(1, micro_batches=2, **settings), way(1, micro_batches=1, batch_size=2, **settings))


@strategies('ddp', 'zero2', slow=('ddp', 'zero2'))
def test_qlora(deepspeed, way):
    settings = dict(micro_batches=4, recipe=dict(tune=LORA), **QLORA)
    assert_equal(way(1, **settings), way(2, deepspeed, **settings))


@strategies('ddp', 'zero2', slow=('ddp', 'zero2'))
def test_three_ranks(deepspeed, way, uneven):
    settings = dict(micro_batches=3, recipe=dict(tune=FULL, data=uneven), **PADDED)
    assert_equal(way(1, **settings), way(3, deepspeed, **settings))


@pytest.mark.slow
@strategies('ddp', 'zero2')
def test_drift_of_adamw(deepspeed, way, uneven, capsys):
    """AdamW divides by the size of the gradient, so that roundings count as much as gradients do: reported."""
    settings = dict(micro_batches=4, recipe=dict(tune=FULL, data=uneven, optimizer='AdamW'), **PADDED)
    at = dict(lr=1e-4, max_steps=STEPS)
    one, two = way(1, **settings).weights(**at), way(2, deepspeed, **settings).weights(**at)
    with capsys.disabled():
        print(
            f'\nAdamW at 1e-4, {STEPS} steps, 1 and 2 ranks ({deepspeed or "ddp"}): weights {apart(one, two):.1e} apart'
        )
    assert apart(one, two) < 1e-4
