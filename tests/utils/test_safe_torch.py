"""Files of torch.save that are not whole. Those that mean harm are in tests/hostile/test_pickles.py."""

import os

import pytest
import torch

from vlmtune.engine.foreign_weights import check_loadable
from vlmtune.utils.errors import CheckpointError


@pytest.mark.parametrize('share', [0.0001, 0.5, 0.999])
def test_a_file_that_is_cut_short(share, tmp_path):
    """As a full disk or a broken download leaves it."""
    path = tmp_path / 'x.pth'
    torch.save(dict(state_dict={f'layer{i}.weight': torch.rand(64, 64) for i in range(8)}), path)
    os.truncate(path, max(4, int(share * path.stat().st_size)))
    with pytest.raises(CheckpointError, match=r'x.pth is not read: it is cut short: .* its end is missing'):
        check_loadable(path)
