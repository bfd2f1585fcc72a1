"""Where tensors live, and whether there is room for them."""

import os

import torch

from vlmtune.utils.errors import ConfigError


def find_device() -> torch.device:
    """The device of this process: its own GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device(
            'cuda', int(os.environ.get('LOCAL_RANK', '0'))
        )  # set by the launcher, as torch documents it
    if torch.backends.mps.is_available():
        return torch.device('mps')
    return torch.device('cpu')


def named_device(name: str) -> torch.device:
    """The device that ``--device`` names; 'auto' is the one of this process.

    Raises:
        ConfigError: another word than cpu, cuda and auto, or a GPU where there is none.
    """
    if name not in ('auto', 'cpu', 'cuda'):
        raise ConfigError(f'--device {name}: expected cpu, cuda or auto')
    if name == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('--device cuda: torch sees no GPU here; use --device cpu')
    return find_device() if name == 'auto' else torch.device(name)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
