"""Process groups, before anything else needs them.

mmengine's own set-up calls CUDA on machines without it; it skips itself where a group exists.
"""

import logging
import os
import re
from typing import Literal

import torch
import torch.distributed as dist

from vlmtune.utils.errors import ConfigError

Launcher = Literal['none', 'pytorch', 'slurm']


def init_distributed(launcher: Launcher, *, alone: bool = False) -> None:
    """Join the process group that the launcher describes.

    Args:
        launcher: 'none', 'pytorch' (torchrun set the environment) or 'slurm' (srun did).
        alone: with 'none', make a group of one process; DeepSpeed needs it.

    Raises:
        ConfigError: the environment is not what the launcher would have set.
    """
    if dist.is_initialized():
        return
    backend = 'nccl' if torch.cuda.is_available() else 'gloo'
    if launcher == 'none':
        if alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if launcher == 'slurm':
        _environment_from_slurm()
    missing = [
        name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ
    ]
    if missing:
        raise ConfigError(f'--launcher {launcher}: {", ".join(missing)} not set; start with torchrun, or use --nproc N')
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group(backend)
    if dist.get_rank() != 0:
        logging.getLogger('vlmtune').setLevel(logging.WARNING)  # the first rank speaks for all


def _environment_from_slurm() -> None:
    """Give torch the variables it reads, from those that srun sets."""
    names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    missing = [slurm for slurm in (*names.values(), 'SLURM_NODELIST') if slurm not in os.environ]
    if missing:
        raise ConfigError(f'--launcher slurm: {", ".join(missing)} not set; start with srun')
    for name, slurm in names.items():
        os.environ[name] = os.environ[slurm]
    first_node = _first_node(os.environ['SLURM_NODELIST'])
    os.environ.setdefault('MASTER_ADDR', first_node)
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', '0')) % 20000))


def _first_node(nodelist: str) -> str:
    """'gpu[03-07,12],cpu1' -> 'gpu03'."""
    first = re.match(r'(?:[^,\[]|\[[^]]*])+', nodelist)
    return re.sub(r'\[([^],-]+)[^]]*]', r'\1', first[0]) if first else nodelist
