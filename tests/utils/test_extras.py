"""A package that is not installed is told with the command that installs it."""

import sys

import pytest

from vlmtune.utils.errors import ConfigError
from vlmtune.utils.extras import need


def test_an_installed_package_is_returned():
    assert need('json.decoder', extra='demo', what='the demo').JSONDecodeError


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ConfigError, match=r"^the demo needs the package gradio.*; pip install 'vlmtune\[demo\]'$"):
        need('gradio', extra='demo', what='the demo')


def test_a_package_that_is_broken_inside_names_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / 'half_installed_thing.py').write_text('import what_it_lacks\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match='half_installed_thing, whose own package what_it_lacks is missing; pip inst'):
        need('half_installed_thing', extra='demo', what='the demo')
