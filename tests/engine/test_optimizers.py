"""Optimizers by setting: fused AdamW, and bitsandbytes' in 8 bit, resumed to the bit.

bitsandbytes' paged ones are plain on the CPU (it warns), so they are the same there.
"""

import pytest

from vlmtune.apps.train import train

OPTIMIZERS = {
    'fused': ('torch.optim', 'AdamW', ', fused=True'),
    '8bit': ('bitsandbytes.optim', 'AdamW8bit', ''),
}


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_a_run_goes_on_where_it_stopped(kind, write_recipe, tmp_path, contents, differences):
    module, name, options = OPTIMIZERS[kind]
    recipe = write_recipe(tmp_path / 'recipe.py', optimizer=name + options)
    text = recipe.read_text().replace('from torch.optim import SGD, AdamW\n', f'from {module} import {name}\n')
    recipe.write_text(text)
    settings = dict(max_epochs=None, max_steps=2, save_steps=1)
    train(str(recipe), work_dir=str(tmp_path / 'whole'), overrides=settings)
    train(str(recipe), work_dir=str(tmp_path / 'halves'), overrides={**settings, 'max_steps': 1})
    train(str(recipe), work_dir=str(tmp_path / 'halves'), resume=True, overrides=settings)
    whole, halves = (contents(tmp_path / folder / 'iter_2.pth') for folder in ('whole', 'halves'))
    assert differences(whole['weights'], halves['weights']) == []
    assert differences(whole['optimizer'], halves['optimizer']) == []
