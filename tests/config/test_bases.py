"""Configs that build on others: what is set again flows into the base."""

import pytest

from vlmtune.config import load_config
from vlmtune.utils.errors import ConfigError


def messages(path, overrides=None):
    with pytest.raises(ConfigError) as failure:
        load_config(path, overrides)
    return str(failure.value)


def test_a_constant_set_again_flows_into_the_base(recipe, write):
    child = write(
        'from mmengine.config import read_base\nwith read_base():\n    from .recipe import *\n'
        'from PARTS import Constructor\nlr = 1.0\noptim_type = Constructor\ntune = dict(llm="full")\n',
        'child.py',
    )
    cfg = load_config(child)
    assert cfg.optim_wrapper.optimizer.lr == 1.0
    assert cfg.optim_wrapper.optimizer.type.__name__ == 'Constructor'
    assert cfg.model.tune == dict(llm='full')
    cfg = load_config(child, {'lr': 2.0, 'tune.llm': 'lora', 'save_steps': 3})
    assert cfg.lr == cfg.optim_wrapper.optimizer.lr == 2.0
    assert cfg.tune == cfg.model.tune == dict(llm='lora')
    assert cfg.default_hooks.checkpoint.interval == 3


def test_an_expression_set_again_is_an_error(recipe, write):
    child = write(
        'from mmengine.config import read_base\nwith read_base():\n    from .recipe import *\nlr = lr * 2\n',
        'child.py',
    )
    message = messages(child)
    assert message.startswith(f'{child}:4: ')
    assert 'set it to a plain value, once' in message


def test_single_names_and_aliases_can_be_taken(recipe, write):
    child = write(
        'from mmengine.config import read_base\nwith read_base():\n'
        '    from .recipe import lr as base_lr, optim_wrapper\nload_from = base_lr\n',
        'sub/../child.py',
    )
    cfg = load_config(child, {'base_lr': 5})
    assert (cfg.load_from, cfg.optim_wrapper.optimizer.lr) == (5, 5)
    assert 'model' not in cfg


def test_relative_base_in_another_folder(recipe, write):
    child = write(
        'from mmengine.config import read_base\nwith read_base():\n    from ..recipe import *\n', 'a/child.py'
    )
    assert load_config(child).lr == 2e-4


def test_missing_base_circle_and_missing_name(recipe, write):
    head = 'from mmengine.config import read_base\nwith read_base():\n    from '
    assert ':3: base config .nowhere not found' in messages(write(head + '.nowhere import *\n', 'b.py'))
    assert ':3: base config no_such.thing not found' in messages(write(head + 'no_such.thing import *\n', 'c.py'))
    assert 'circle' in messages(write(head + '.d import *\n', 'd.py'))
    assert "has no 'nope'" in messages(write(head + '.recipe import nope\n', 'e.py'))


def test_syntax_error_in_a_base_names_the_base(write):
    write('lr = = 3\n', 'broken.py')
    child = write('from mmengine.config import read_base\nwith read_base():\n    from .broken import *\n', 'f.py')
    assert 'broken.py:1:6: syntax error' in messages(child)
