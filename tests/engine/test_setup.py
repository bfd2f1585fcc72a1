"""Process groups from what launchers leave in the environment."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config

from vlmtune.engine import ranks, setup
from vlmtune.engine.ranks import Bounds, RankMissing
from vlmtune.engine.setup import bounds_of, init_distributed
from vlmtune.utils.errors import ConfigError

TORCHRUN = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
SLURM = (
    'SLURM_CPUS_PER_TASK',
    'SLURM_STEP_NODELIST',
    'SLURM_PROCID',
    'SLURM_NTASKS',
    'SLURM_LOCALID',
    'SLURM_NODELIST',
    'SLURM_JOB_ID',
)


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
    monkeypatch.setattr(setup, '_meet', lambda rank, world_size: dist.HashStore())
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **how: seen.update(backend=backend, **how))
    monkeypatch.setattr(ranks, 'join', lambda store, bounds: seen.update(bounds=bounds))
    init_distributed('slurm', bounds=Bounds(7, 8))
    del seen['store']
    backend = 'nccl' if torch.cuda.is_available() else 'gloo'
    assert seen == dict(backend=backend, rank=0, world_size=1, timeout=timedelta(seconds=7), bounds=(7, 8))
    found = {name: os.environ[name] for name in TORCHRUN}
    assert found == dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR=first, MASTER_PORT='20123')


def test_a_step_of_slurm_counts_its_own_nodes_and_shares_the_cpu(environment, monkeypatch):
    values = dict(
        SLURM_PROCID='0', SLURM_NTASKS='4', SLURM_LOCALID='0', SLURM_NODELIST='a[1-2]', SLURM_CPUS_PER_TASK='3'
    )
    for name, value in {**values, 'SLURM_STEP_NODELIST': 'a2'}.items():
        environment.setenv(name, value)
    environment.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(setup, '_meet', lambda rank, world_size: dist.HashStore())
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **how: None)
    monkeypatch.setattr(ranks, 'join', lambda store, bounds: None)
    try:
        init_distributed('slurm')
        assert (os.environ['MASTER_ADDR'], torch.get_num_threads()) == ('a2', 3)
    finally:
        torch.set_num_threads(1)


def test_ranks_that_never_start_are_named(environment, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    values = dict(RANK='0', WORLD_SIZE='3', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    for name, value in values.items():
        environment.setenv(name, value)
    monkeypatch.setattr(setup, '_START', 2.0)
    message = f'rank 1, rank 2 of 3 did not come to 127.0.0.1:{port} within 2 s of the start of rank 0'
    with pytest.raises(RankMissing, match=message):
        init_distributed('pytorch')
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ('timeouts', 'message'),
    [
        (5, r'timeouts=5: expected dict\(step=600, other=7200\), in seconds'),
        (dict(step=0), 'timeouts.step=0: expected seconds, more than 0'),
        (dict(other='1h'), "timeouts.other='1h': expected seconds, more than 0"),
        (dict(other=True), 'timeouts.other=True: expected seconds'),
        (dict(step=float('nan')), 'timeouts.step=nan: expected seconds'),
    ],
)
def test_bounds_are_positive_numbers_of_seconds(timeouts, message):
    with pytest.raises(ConfigError, match=message):
        bounds_of(Config(dict(timeouts=timeouts)))
    assert bounds_of(Config(dict(timeouts=dict(step=60)))) == Bounds(60, 7200)
    assert bounds_of(Config()) == Bounds(600, 7200)
