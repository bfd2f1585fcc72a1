"""The pages give the same file names to different folders."""

import sys

import pytest


@pytest.fixture(autouse=True)
def modules_of_this_test(monkeypatch, tmp_path):
    """What a config puts on ``sys.path`` leaves with its test, as do the modules of the test's folder."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
    yield
    for name, module in [*sys.modules.items()]:
        if (getattr(module, '__file__', None) or '').startswith(str(tmp_path)):
            del sys.modules[name]
