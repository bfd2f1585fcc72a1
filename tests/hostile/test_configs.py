"""A config is code that the operator chose, in one format. A file that only looks like a config is not run.

Elsewhere: other formats and unknown names, tests/config/test_reader.py.
"""

import pytest

from vlmtune.apps.train import train
from vlmtune.cli import main
from vlmtune.utils.errors import ConfigError


@pytest.mark.parametrize('name', ['x.yaml', 'x.yml', 'x.json', 'x.toml', 'x.pkl', 'x'])
def test_other_formats_are_not_read(name, touch, refused, tmp_path):
    (tmp_path / name).write_text(f'a: !!python/object/apply:os.system ["{touch}"]\n')
    with refused(error=ConfigError):
        train(str(tmp_path / name))


def test_the_command_line_says_it_in_one_line(touch, mark, tmp_path, capsys):
    (tmp_path / 'x.yaml').write_text(f'a: !!python/object/apply:os.system ["{touch}"]\n')
    assert main(['train', str(tmp_path / 'x.yaml')]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not mark.exists()
