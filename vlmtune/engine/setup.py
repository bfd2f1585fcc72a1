"""Process groups, before anything else needs them.

mmengine's own set-up calls CUDA on machines without it; it and DeepSpeed's skip themselves where a group exists.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from mmengine.config import Config
from transformers.utils.logging import disable_progress_bar

from vlmtune.engine import ranks
from vlmtune.engine.ranks import DEFAULT_BOUNDS, Bounds
from vlmtune.utils.errors import ConfigError

_LONGEST = 30 * 24 * 3600  # seconds
_START = 1800.0  # seconds until all ranks have started

Launcher = Literal['none', 'pytorch', 'slurm']


def init_distributed(launcher: Launcher, *, alone: bool = False, bounds: Bounds = DEFAULT_BOUNDS) -> None:
    """Join the process group that the launcher describes, and open the side channel of ``ranks``.

    Args:
        launcher: 'none', 'pytorch' (torchrun set the environment) or 'slurm' (srun did).
        alone: with 'none', make a group of one process; DeepSpeed needs it.
        bounds: how long ranks wait for each other.

    Raises:
        ConfigError: the environment is not what the launcher would have set, or promises devices that are not there.
        RankMissing: not all ranks have started in time.
    """
    if dist.is_initialized():
        return
    if launcher == 'none':
        if alone:
            os.environ.setdefault('LOCAL_RANK', '0')  # DeepSpeed reads it; a launcher would have set it
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        return
    if launcher == 'slurm':
        _environment_from_slurm()
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f'--launcher {launcher}: {", ".join(missing)} not set; start with torchrun, or use --nproc N')
    if os.environ['RANK'] != '0':
        logging.getLogger('vlmtune').setLevel(logging.WARNING)  # the first rank speaks for all
        disable_progress_bar()
    _choose_device(int(os.environ['LOCAL_RANK']))
    limit = timedelta(seconds=bounds.step)
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    try:
        store = _meet(rank, world_size)
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size, timeout=limit)
        ranks.join(store, bounds=bounds)
    except dist.DistError as error:
        where = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        raise ranks.RankMissing(
            f'rank {rank} of {world_size} lost the others at {where} while starting: {error}'
        ) from error


def _meet(rank: int, world_size: int) -> dist.Store:
    """The store that torchrun or the first rank holds, once all ranks have come to it.

    Raises:
        RankMissing: some have not, in time.
    """
    host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    is_master = rank == 0 and not ranks.store_is_torchruns()
    limit = timedelta(seconds=_START)
    tcp = dist.TCPStore(host, port, world_size, is_master, limit, wait_for_workers=False, multi_tenant=True)
    store = dist.PrefixStore(f'start {restarts()}', tcp)  # torchrun's is the same when it starts the ranks again
    keys = [f'vlmtune/started/{other}' for other in range(world_size)]
    store.set(keys[rank], '')
    end = time.monotonic() + _START
    while not store.check(keys):
        if time.monotonic() > end:
            missing = ', '.join(f'rank {other}' for other, key in enumerate(keys) if not store.check([key]))
            raise ranks.RankMissing(
                f'{missing} of {world_size} did not come to {host}:{port} within {_START:g} s of the start of '
                f'rank {rank}; see what was printed there, and whether that machine can reach this address'
            )
        time.sleep(0.05)
    return store


def restarts() -> int:
    """How often torchrun has started this group again (``--max-restarts``)."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'))


def bounds_of(cfg: Config) -> Bounds:
    """The bounds that ``timeouts`` of a config sets.

    Raises:
        ConfigError: it is not a dict of positive numbers.
    """
    given = cfg.get('timeouts') or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f'timeouts={given!r}: expected dict(step=600, other=7200), in seconds')
    for name, seconds in given.items():
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (number and 0 < seconds <= _LONGEST):
            raise ConfigError(f'timeouts.{name}={seconds!r}: expected seconds, more than 0 and at most {_LONGEST}')
    return Bounds(**given)


def leave_distributed() -> None:
    """Leave the process group, if there is one."""
    ranks.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend() -> str:
    return 'nccl' if torch.cuda.is_available() else 'gloo'


def _choose_device(local_rank: int) -> None:
    if not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f'process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; '
            'start as many processes as there are GPUs'
        )
    torch.cuda.set_device(local_rank)


def _environment_from_slurm() -> None:
    """Give torch the variables it reads, from those that srun sets, and this process its share of the CPU."""
    names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    missing = [slurm for slurm in (*names.values(), 'SLURM_NODELIST') if slurm not in os.environ]
    if missing:
        raise ConfigError(f'--launcher slurm: {", ".join(missing)} not set; start with srun')
    for name, slurm in names.items():
        os.environ[name] = os.environ[slurm]
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ['SLURM_NODELIST']  # a step may have some of the job's
    os.environ.setdefault('MASTER_ADDR', _first_node(nodes))
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', '0')) % 20000))
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(_threads_from_slurm())


def _threads_from_slurm() -> int:
    """The CPUs of a task, or this node's divided by its tasks: '4(x2),3' is how slurm counts those, node by node."""
    if os.environ.get('SLURM_CPUS_PER_TASK', '').isdecimal():
        return max(1, int(os.environ['SLURM_CPUS_PER_TASK']))
    tasks = re.match(r'\d+', os.environ.get('SLURM_TASKS_PER_NODE', os.environ['SLURM_NTASKS']))
    return max(1, (os.cpu_count() or 1) // max(1, int(tasks[0] if tasks else 1)))


def _first_node(nodelist: str) -> str:
    """'gpu[03-07,12],cpu1' -> 'gpu03'."""
    first = re.match(r'(?:[^,\[]|\[[^]]*])+', nodelist)
    return re.sub(r'\[([^],-]+)[^]]*]', r'\1', first[0]) if first else nodelist
