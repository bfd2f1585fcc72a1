"""Which device a word names."""

import pytest
import torch

from vlmtune.utils.device import find_device, named_device
from vlmtune.utils.errors import ConfigError


def test_what_the_words_name(monkeypatch):
    assert named_device('cpu') == torch.device('cpu')
    assert named_device('auto') == find_device()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match='^--device cuda: torch sees no GPU here; use --device cpu$'):
        named_device('cuda')
    with pytest.raises(ConfigError, match='^--device tpu: expected cpu, cuda or auto$'):
        named_device('tpu')
