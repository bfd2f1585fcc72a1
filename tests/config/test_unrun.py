"""A config that is read and never run: what it says plainly is known, and nothing else happens."""

import pytest

from vlmtune.config.unrun import Name, read_unrun
from vlmtune.utils.errors import CheckpointError, ConfigError


def test_plain_values_and_names():
    text = """
from torch.optim import AdamW
a, b = 1, 2
root = './data/'
lr: float = 1e-3
path = root + f'{root}rows-{7}.json'
betas = (0.9, -.5)
size = int(2048 - (336 / 14)**2)
model = dict(type=AdamW, lora={'r': 8, 1: [True, None]}, path=path, **more)
path = PROMPT.vicuna
"""
    assert read_unrun(text, name='x.py') == dict(
        root='./data/', path='PROMPT.vicuna', betas=[0.9, -0.5], size=1472,
        model=dict(type='AdamW', lora={'r': 8, 1: [True, None]}, path='./data/./data/rows-7.json'),
    )  # fmt: skip
    assert read_unrun(text, name='x.py')['path'].last == 'vicuna'


@pytest.mark.parametrize(
    'text',
    [
        "open('/gone', 'w')", '__import__("os").getpid()', "f'{find()}'", "f'{7:03d}'", "f'{7!r}'", "'a' + find()",
        "'a' * 10**9", '1 / 0', 'int(1e999)', 'int("7")', 'x.y', '[1][0]', 'lambda: 1', '-find()', 'dict(find(), a=1)',
    ],
)  # fmt: skip
def test_all_else_is_left_as_text(text):
    found = read_unrun(f'a = {text}', name='x.py')['a']
    assert isinstance(found, Name)


def test_sums_that_double_themselves_end_soon():
    text = 'a = 9\nb = "b"\n' + 'a = a**2\nb = b + b\n' * 64
    found = read_unrun(text, name='x.py')
    assert isinstance(found['a'], Name)
    assert isinstance(found['b'], Name)


@pytest.mark.parametrize('text', ['a = (', b'a = "\xff"', 'a = \0', 'a = ' + '[' * 9999, 'a = ' + '1+' * 99_999 + '1'])
def test_what_is_no_config_is_one_line(text):
    for error in (ConfigError, CheckpointError):
        with pytest.raises(error, match=r'^x\.py is (no Python file|nested too deeply)') as told:
            read_unrun(text, name='x.py', error=error)
        assert '\n' not in str(told.value)
