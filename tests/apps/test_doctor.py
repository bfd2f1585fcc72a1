"""The doctor tells what works, what is missing with the command that installs it, and what is known to go wrong."""

import json
import shutil
from collections import namedtuple
from importlib import metadata

import pytest

from vlmtune.apps.doctor import FEATURES, Feature, diagnose
from vlmtune.cli import main


def test_an_optional_part_is_tried_and_not_only_looked_for(tmp_path, monkeypatch):
    (tmp_path / 'sound_part.py').write_text('')
    (tmp_path / 'broken_part.py').write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    parts = [Feature(name, (name,), f'pip install {name}') for name in ('sound_part', 'broken_part', 'absent_part')]
    found = diagnose(parts)
    assert [part.state for part in found.features] == ['usable', 'broken', 'missing']
    assert found.features[2].detail == 'pip install absent_part'
    assert any('import broken_part fails' in line and 'nms does not exist' in line for line in found.problems)


def test_every_package_of_a_part_must_be_there(tmp_path, monkeypatch):
    (tmp_path / 'sound_part.py').write_text('')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (part,) = diagnose([Feature('both', ('sound_part', 'absent_part'), 'pip install both')]).features
    assert part.state == 'missing'


def test_what_lies_in_the_folder_is_not_taken_for_a_package(tmp_path, monkeypatch):
    (tmp_path / 'lying_around.py').write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    (part,) = diagnose([Feature('one', ('lying_around',), 'pip install one')]).features
    assert part.state == 'missing'
    assert not (tmp_path / 'ran').exists()


def test_a_version_below_the_tested_one_is_a_problem(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda name: '4.40.0' if name == 'transformers' else real(name))
    assert [line for line in diagnose([]).problems if line.startswith('transformers is 4.40.0; pip install ')]


def test_small_shared_memory_is_a_problem(monkeypatch):
    usage, real = namedtuple('usage', 'total used free'), shutil.disk_usage
    small = usage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: small if str(path) == '/dev/shm' else real(path))
    assert any('--shm-size' in line for line in diagnose([]).problems)


def test_a_secret_in_an_address_is_not_printed(monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'https://me:a-long-password@mirror.example')
    assert 'a-long-password' not in diagnose([]).text()
    assert 'mirror.example' in diagnose([]).text()


@pytest.mark.slow  # imports every optional package
def test_the_command_prints_every_part_and_json_on_request(capsys):
    main(['doctor', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert [part['name'] for part in found['features']] == [feature.name for feature in FEATURES]
    assert found['versions']['torch'] == metadata.version('torch')


def test_a_lock_that_deepspeed_would_wait_for_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    lock = tmp_path / 'cpu_adam' / 'lock'
    lock.parent.mkdir()
    lock.touch()
    assert any(line.startswith(f'{lock}: a killed run has left it') for line in diagnose([]).problems)
