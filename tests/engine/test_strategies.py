"""Two processes learn what one learns with twice the micro-batches."""

import subprocess
import sys

import torch
from safetensors.torch import load_file

from vlmtune.engine.checkpoint import verify


def train(recipe, work_dir, *options, **overrides):
    command = [sys.executable, '-m', 'vlmtune', 'train', str(recipe), '--work-dir', str(work_dir), *options]
    settings = [f'{name}={value!r}' for name, value in overrides.items()]
    done = subprocess.run(
        [*command, *(['--cfg-options', *settings] if settings else [])], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_processes_equal_one_with_twice_the_accumulation(run, write_recipe, contents, tmp_path):
    """SGD at 0.5 moves weights by 0.1; the order of float32 sums differs: 1e-6."""
    settings = dict(lora_dropout=0.0, max_norm=1e9, lr=0.5, max_steps=4, max_epochs=None)
    one = run('one', recipe=dict(optimizer='SGD'), **settings, accumulative_counts=4)
    recipe = write_recipe(tmp_path / 'two.py', optimizer='SGD')
    printed = train(recipe, tmp_path / 'two', '--nproc', '2', **settings, accumulative_counts=2)
    assert '2 processes' in printed
    assert verify(tmp_path / 'two' / 'iter_4.pth')['world_size'] == 2
    mine, theirs = (load_file(tmp_path / name / 'iter_4.pth' / 'model.safetensors') for name in ('one', 'two'))
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) < 1e-6
    logs = [contents(path / 'iter_4.pth')['messages'] for path in (one, tmp_path / 'two')]
    for name in ('train/loss', 'train/grad_norm'):
        values = [torch.tensor(log[name]['values']) for log in logs]
        torch.testing.assert_close(*values, rtol=1e-5, atol=0)


def test_every_part_in_full_with_fillers_and_text_only_ranks(write_recipe, tmp_path):
    """Vision, embeddings and head train; one rank has no image and, in the last step, nothing to learn at all."""
    tune = dict(vision_encoder='full', projector='full', llm='full')
    recipe = write_recipe(tmp_path / 'full.py', tune=tune)
    settings = dict(pack_to_max_length=False, shuffle=False, max_epochs=1, accumulative_counts=3, save_steps=2)
    train(recipe, tmp_path / 'full', '--nproc', '2', **settings)
    assert {path.name for path in (tmp_path / 'full').glob('iter_*')} == {'iter_2.pth', 'iter_3.pth'}
    before = (tmp_path / 'full' / 'iter_3.pth' / 'model.safetensors').read_bytes()
    for path in (tmp_path / 'full' / 'iter_3.pth').iterdir():  # as a kill behind step 2 leaves it
        if path.name == 'manifest.json':
            path.unlink()
    printed = train(recipe, tmp_path / 'full', '--nproc', '2', '--resume', **settings)
    assert 'iter_2.pth at iteration 2 of 3' in printed
    assert (tmp_path / 'full' / 'iter_3.pth' / 'model.safetensors').read_bytes() == before
