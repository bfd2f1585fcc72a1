"""``vlmtune train --nproc N``, before anything starts; tests/engine/test_launched_runs.py has the rest."""

import pytest
import torch

from vlmtune.apps.launch import launch
from vlmtune.utils.errors import UserError


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(UserError, match='--nproc 2: this machine has 1 GPUs; one process uses one'):
        launch(['train', 'c'], nproc=2)
