"""The pages give the same file names to different folders."""

import sys

import pytest


@pytest.fixture(autouse=True)
def path_of_this_test(monkeypatch):
    """What a config puts on ``sys.path`` leaves with its test."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
