"""Verbs that list, copy and print recipes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from vlmtune.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_config_verbs(recipe, tmp_path, capsys):
    assert main(['list-cfg']) == 0
    assert capsys.readouterr().out == 'tiny_lora\n'
    assert main(['list-cfg', '-p', 'nothing']) == 1
    assert "error: no built-in config matches 'nothing'" in capsys.readouterr().err
    assert main(['copy-cfg', 'tiny_lora', str(tmp_path / 'mine')]) == 0
    copied = capsys.readouterr().out.strip()
    assert main(['print-cfg', copied, '--cfg-options', 'lr=5']) == 0
    assert 'optim_wrapper = dict(optimizer=dict(lr=5))' in capsys.readouterr().out
    assert main(['print-cfg', 'tiny_loar']) == 1
    assert capsys.readouterr().err == "error: no built-in config is named 'tiny_loar'; the nearest are tiny_lora\n"


def test_a_closed_pipe_is_no_failure(recipe):
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    command = shlex.join([sys.executable, '-m', 'vlmtune', 'print-cfg', str(recipe)]) + ' | true'
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stderr == ''
