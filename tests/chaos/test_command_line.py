"""Whole processes, started from the command line, that are killed at any time."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

KILLER = """

from mmengine.hooks import Hook


class KillOnce(Hook):
    \"\"\"Rank 1 dies behind step 3 of the first try.\"\"\"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        marker = {marker!r}
        if runner.rank == 1 and runner.iter + 1 == 3 and not os.path.exists(marker):
            open(marker, 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def options(overrides):
    """Settings as the command line takes them."""
    return ['--cfg-options', *(f'{name}={value!r}' for name, value in overrides.items())]


def command(overrides, work_dir, *more):
    start = [sys.executable, '-m', 'vlmtune', 'train', 'llava_1_5_7b_lora_mix665k', '--work-dir', str(work_dir)]
    return [*start, *more, *options(overrides)]


@pytest.mark.chaos
def test_twenty_processes_killed(overrides, check_end, run_env, tmp_path, capsys):
    """SIGKILL from outside, at a drawn moment from the start of the training on; again until one ends."""
    rng, killed, ended = random.Random(20), 0, 0
    while killed < 20:
        work_dir = tmp_path / str(ended)
        for _ in range(min(5, 20 - killed)):
            process = subprocess.Popen(
                command(overrides(1), work_dir, '--resume'), env=run_env,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while not list(work_dir.glob('iter_*')) and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.random() * 1.5)
            if process.poll() is None:
                process.kill()
                killed += 1
            process.wait()
        done = subprocess.run(command(overrides(1), work_dir, '--resume'), env=run_env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        check_end(work_dir, 1)
        ended += 1
    with capsys.disabled():
        print(f'\n{killed} processes killed from outside; {ended} runs ended with the undisturbed bits')


@pytest.mark.chaos
def test_a_killed_rank_is_started_again(overrides, check_end, run_env, tmp_path):
    """torchrun starts all ranks anew; they go on from the newest checkpoint by themselves."""
    marker = tmp_path / 'killed'
    recipe = tmp_path / 'recipe.py'
    (tmp_path / 'killer.py').write_text('import os\nimport signal\n' + KILLER.format(marker=str(marker)))
    subprocess.run(
        [sys.executable, '-m', 'vlmtune', 'copy-cfg', 'llava_1_5_7b_lora_mix665k', str(tmp_path)], check=True
    )
    text = (tmp_path / 'llava_1_5_7b_lora_mix665k.py').read_text()
    recipe.write_text(text + '\nfrom killer import KillOnce\n\ncustom_hooks = [dict(type=KillOnce)]\n')
    train = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1']
    script = os.path.join(os.path.dirname(__file__), '..', '..', 'tools', 'train.py')
    done = subprocess.run(
        [sys.executable, *train, script, str(recipe), '--launcher', 'pytorch', '--work-dir', str(tmp_path / 'run'),
         *options(overrides(2))],
        env=run_env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert marker.exists()
    assert done.returncode == 0, done.stderr[-3000:]
    check_end(tmp_path / 'run', 2)


@pytest.mark.chaos
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_two_processes_saves(signum, overrides, check_end, run_env, tmp_path):
    settings = {**overrides(2), 'save_steps': 1000, 'max_epochs': 300, 'default_hooks.logger.interval': 1}
    work_dir = tmp_path / 'run'
    process = subprocess.Popen(
        command(settings, work_dir, '--nproc', '2'), env=run_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if ' 2/1800' in line:  # Ctrl-C reaches every process of a terminal, SIGTERM the one that was started
            os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    assert process.wait(120) == 128 + signum, ''.join(said)
    (saved,) = work_dir.glob('iter_*.pth')
    assert 2 <= int(saved.stem.removeprefix('iter_')) < 1800
    assert f'{saved.name}' in ''.join(said)
    assert '--resume' in ''.join(said[-8:])
