"""Process groups from what launchers leave in the environment."""

import os

import pytest
import torch
import torch.distributed as dist

from vlmtune.engine.setup import init_distributed
from vlmtune.utils.errors import ConfigError

TORCHRUN = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
SLURM = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NODELIST', 'SLURM_JOB_ID')


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Empty of launchers, and no group is left behind."""
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_process_needs_no_group_unless_it_asks():
    init_distributed('none')
    assert not dist.is_initialized()
    init_distributed('none', alone=True)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    init_distributed('none', alone=True)  # once is enough


@pytest.mark.parametrize(
    ('launcher', 'message'),
    [
        (
            'pytorch',
            'RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; start with torchrun, or use --nproc N',
        ),
        ('slurm', 'SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NODELIST not set; start with srun'),
    ],
)
def test_a_launcher_that_did_not_start_us(launcher, message):
    with pytest.raises(ConfigError, match=f'--launcher {launcher}: {message}'):
        init_distributed(launcher)


@pytest.mark.parametrize(
    ('nodelist', 'first'),
    [
        ('node7', 'node7'),
        ('node7,node8', 'node7'),
        ('gpu[03-07,12]', 'gpu03'),
        ('gpu[03,05],cpu1', 'gpu03'),
        ('login,gpu[03-07]', 'login'),
        ('gpu[3-4]-ib', 'gpu3-ib'),
        ('rack[1,2]node[08-09],x', 'rack1node08'),
    ],
)
def test_the_first_node_of_slurm_is_the_master(nodelist, first, environment, monkeypatch):
    values = dict(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0', SLURM_NODELIST=nodelist, SLURM_JOB_ID='123')
    for name, value in values.items():
        environment.setenv(name, value)
    seen = {}
    monkeypatch.setattr(dist, 'init_process_group', lambda backend: seen.update(backend=backend))
    monkeypatch.setattr(dist, 'get_rank', lambda: 0)
    init_distributed('slurm')
    assert seen == {'backend': 'nccl' if torch.cuda.is_available() else 'gloo'}
    found = {name: os.environ[name] for name in TORCHRUN}
    assert found == dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR=first, MASTER_PORT='20123')
