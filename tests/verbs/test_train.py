"""``--nproc`` starts the same command in several processes; what fails there is told once."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.cli import build_parser, main
from vlmtune.verbs.train import resume_command, train_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launched(monkeypatch):
    found = []
    from vlmtune.apps import launch

    monkeypatch.setattr(launch, 'launch', lambda command, nproc, **_: found.append((nproc, list(command))) or 0)
    return found


def test_nproc_starts_the_same_command_under_torchrun(called, launched, recipe):
    line = '--nproc 2 --seed 3 --resume --deepspeed zero2 --work-dir w --dry-run --cfg-options lr=3'
    assert main(['train', str(recipe), *line.split()]) == 0
    assert called == []
    ((nproc, command),) = launched
    assert nproc == 2
    assert main(command) == 0  # a launcher is given, so nothing is launched again
    expected = dict(
        config=str(recipe),
        work_dir='w',
        resume=True,
        overrides={'lr': 3},
        seed=3,
        launcher='pytorch',
        deepspeed='zero2',
        reset_optimizer=False,
        dry_run=True,
    )
    assert called == [('train', (), expected)]


def test_the_variable_does_the_same(called, launched, recipe, monkeypatch, capsys):
    monkeypatch.setenv('NPROC_PER_NODE', '4')
    assert main(['train', str(recipe)]) == 0
    assert main(['train', str(recipe), '--nproc', '2']) == 0
    assert [nproc for nproc, _ in launched] == [4, 2]
    assert main(['train', str(recipe), '--nproc', '1']) == 0
    assert main(['train', str(recipe), '--launcher', 'pytorch']) == 0
    assert len(called) == 2
    monkeypatch.setenv('NPROC_PER_NODE', 'gpu')
    assert main(['train', str(recipe)]) == 1
    assert "NPROC_PER_NODE holds 'gpu', expected a positive integer" in capsys.readouterr().err


def test_nproc_and_a_launcher_exclude_each_other(called, recipe, capsys):
    assert main(['train', str(recipe), '--nproc', '2', '--launcher', 'slurm']) == 1
    assert capsys.readouterr().err == 'error: --nproc starts the processes itself; leave out --launcher slurm\n'


def test_config_mistakes_are_told_once_before_anything_starts(called, launched, recipe, capsys):
    assert main(['train', str(recipe), '--nproc', '2', '--cfg-options', 'lrr=3']) == 1
    assert launched == []
    assert capsys.readouterr().err == "error: --cfg-options lrr: unknown name 'lrr', did you mean 'lr'?\n"


@pytest.mark.parametrize(
    ('typed', 'goes_on'),
    [
        ('train c.py', 'train c.py --resume'),
        ('train c.py --seed 3 --resume a --cfg-options lr=3', 'train c.py --seed 3 --resume --cfg-options lr=3'),
        ('train c.py --dry-run', 'train c.py --dry-run'),
        ('train c.py --dry-run --resume a', 'train c.py --resume a --dry-run'),
    ],
)
def test_what_to_type_to_go_on(typed, goes_on):
    assert resume_command(build_parser().parse_args(typed.split())) == f'vlmtune {goes_on}'


def test_every_option_of_train_reaches_the_processes():
    """A new option has to be added to train_command."""
    line = ['train', 'c.py', '--resume', 'k', '--debug', '--cfg-options', 'a=1', 'b=2', '--dry-run']
    line += ['--work-dir', 'w', '--seed', '0', '--deepspeed', 'zero1', '--reset-optimizer']
    given = build_parser().parse_args(line)
    again = build_parser().parse_args(train_command(given))
    assert vars(again) == {**vars(given), 'launcher': 'pytorch'}


def real_run(tmp_path, text):
    """torchrun really starts two processes; the config works for the command itself and fails for them."""
    path = tmp_path / 'failing.py'
    path.write_text(f"import os\nrank = os.environ.get('RANK')\n{text}\nload_from = value\n")
    command = [sys.executable, '-m', 'vlmtune', 'train', str(path), '--nproc', '2']
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


def test_a_failing_process_has_the_last_word(tmp_path):
    run = real_run(tmp_path, 'value = 1 / (rank is None)')
    assert run.returncode == 1
    assert 'failing.py:3: ZeroDivisionError: division by zero' in run.stderr.splitlines()[-1]
    assert 'Traceback' not in run.stderr


@pytest.mark.slow
def test_a_killed_process_is_named(tmp_path):
    run = real_run(tmp_path, "value = os.kill(os.getpid(), 9) if rank == '1' else None")
    assert run.returncode == 1
    assert 'error: process 1 of 2 was ended by SIGKILL, as the system does when memory is short' in run.stderr
