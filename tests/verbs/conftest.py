"""Applications that only note how they are called, and a recipe that is the only one."""

import sys
import types

import pytest

from vlmtune import recipes


@pytest.fixture
def called(monkeypatch):
    """Stands in for the applications and records how they are called."""
    calls = []

    def stand_in(module, *functions):
        fake = types.ModuleType(f'vlmtune.apps.{module}')
        for name in functions:
            setattr(fake, name, lambda *args, name=name, **kwargs: calls.append((name, args, kwargs)))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

    stand_in('train', 'train')
    stand_in('data.check_data', 'check_data')
    stand_in('data.browse_data', 'browse_data')
    stand_in('export.convert', 'pth_to_hf')
    stand_in('export.merge', 'merge')
    stand_in('export.verify_model', 'verify_model')
    stand_in('chat', 'chat')
    monkeypatch.delenv('NPROC_PER_NODE', raising=False)
    return calls


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    path = tmp_path / 'configs' / 'tiny_lora.py'
    path.write_text('lr = 1\noptim_wrapper = dict(optimizer=dict(lr=lr))\n')
    monkeypatch.setattr(recipes, 'recipe_root', lambda: path.parent)
    return path
