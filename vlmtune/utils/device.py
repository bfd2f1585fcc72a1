"""Where tensors live."""

import os

import torch


def find_device() -> torch.device:
    """The device of this process: its own GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device(
            'cuda', int(os.environ.get('LOCAL_RANK', '0'))
        )  # set by the launcher, as torch documents it
    if torch.backends.mps.is_available():
        return torch.device('mps')
    return torch.device('cpu')
