"""Runs of two processes under every launcher: what signals and deaths do to them, for real."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from vlmtune.engine.manifest import verify

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ['max_epochs=None', 'max_steps=24', 'save_steps=4']


def start(command, *, at, do):
    """Run it, call ``do(process)`` when a line matches ``at``; (exit code, lines)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, done = [], False
    for line in process.stdout:
        lines.append(line)
        if not done and re.search(at, line):
            do(process)
            done = True
    return process.wait(timeout=600), lines


def rank(process, number):
    return next(c for c in psutil.Process(process.pid).children() if c.environ().get('RANK') == str(number))


@pytest.fixture
def command(write_recipe, tmp_path):
    recipe = write_recipe(tmp_path / 'recipe.py')

    def make(name, *options, program=('-m', 'vlmtune', 'train')):
        given = ['--work-dir', str(tmp_path / name), *options, '--cfg-options', *SETTINGS]
        return [sys.executable, *program, str(recipe), *given]

    return make


def weights(path):
    return load_file(path / 'iter_24.pth' / 'model.safetensors')


@pytest.fixture
def stopped(command, tmp_path):
    """The work dir of a run of two ranks that SIGTERM has stopped after its step 5 or so."""
    code, lines = start(command('run', '--nproc', '2'), at=r'step +5/', do=lambda p: p.send_signal(signal.SIGTERM))
    assert code == 143, ''.join(lines)
    assert [sum(text in line for line in lines) for text in ('stopped by SIGTERM', 'Loading weights: 100%')] == [1, 1]
    assert re.fullmatch(r'to go on: vlmtune train .+ --nproc 2 --work-dir .+ --resume --cfg-options .*\n', lines[-1])
    return tmp_path / 'run'


def test_sigterm_to_the_launcher_saves_on_all_ranks(stopped):
    (saved,) = [path for path in stopped.glob('iter_*') if path.name != 'iter_4.pth']
    assert verify(saved)['world_size'] == 2


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_ends_with_the_undisturbed_weights(stopped, command, tmp_path):
    again = command('run', '--nproc', '2', '--max-restarts', '1', '--resume')
    code, lines = start(again, at=r'step +14/', do=lambda p: rank(p, 1).kill())
    text = ''.join(lines)
    assert code == 0, text
    assert re.search('rank 1 has died .*; seen by rank 0', text)
    assert 'restart 1 by torchrun: goes on from the newest checkpoint' in text
    assert re.search(r'resumed from .+iter_1[26]\.pth', text)
    code, lines = start(command('whole', '--nproc', '2'), at='never', do=None)
    assert code == 0, ''.join(lines)
    mine, undisturbed = weights(tmp_path / 'run'), weights(tmp_path / 'whole')
    assert mine.keys() == undisturbed.keys()
    assert all(torch.equal(mine[name], undisturbed[name]) for name in mine)


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_save_and_end(command, tmp_path):
    """Both hold the pipe: it closes when the last has ended."""
    code, lines = start(command('run', '--nproc', '2'), at=r'step +5/', do=lambda p: p.kill())
    assert code == -signal.SIGKILL
    assert sum('stopped by SIGTERM' in line for line in lines) == 1, ''.join(lines)
    assert not (tmp_path / 'run' / 'iter_24.pth').exists()


@pytest.mark.slow
def test_two_tasks_of_slurm(command, tmp_path):
    environment = dict(SLURM_NTASKS='2', SLURM_NODELIST='localhost', SLURM_JOB_ID='8000', SLURM_CPUS_PER_TASK='1')
    line = command('slurm', '--launcher', 'slurm', program=[str(ROOT / 'tools' / 'train.py')])
    tasks = [
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os_environ(), **environment, 'SLURM_PROCID': str(task), 'SLURM_LOCALID': str(task)},
        )
        for task in range(2)
    ]  # fmt: skip
    printed = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert '2 processes' in printed[0]
    assert weights(tmp_path / 'slurm')


@pytest.mark.slow
def test_dist_train_is_torchrun(command, tmp_path):
    line = command('dist', program=())
    script = ['bash', str(ROOT / 'tools' / 'dist_train.sh'), line[1], '2', *line[2:]]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, env=os_environ(MASTER_PORT='29517'))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / 'dist')


def os_environ(**more):
    return {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', **more}
