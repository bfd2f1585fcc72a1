"""A run to report."""

import pytest

from vlmtune.testing.tiny_runs import write_tiny_run


@pytest.fixture
def run(tmp_path):
    return write_tiny_run(tmp_path / 'alpha')
