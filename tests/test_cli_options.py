"""Freezes the command line: every verb, every option, every default, and the doors in tools/."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from vlmtune.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]

FROZEN = {
    'train': {
        'positional': ['config'],
        '--work-dir': None,
        '--resume': False,
        '--reset-optimizer': False,
        '--cfg-options': [],
        '--seed': None,
        '--launcher': 'none',
        '--deepspeed': None,
        '--nproc': None,
        '--max-restarts': None,
        '--dry-run': False,
    },
    'test': {
        'positional': ['config', 'checkpoint'],
        '--out': None,
        '--work-dir': None,
        '--limit': None,
        '--batch-size': None,
        '--launcher': 'none',
        '--nproc': None,
        '--cfg-options': [],
    },
    'check-data': {'positional': ['config'], '--json': False, '--decode': False, '--cfg-options': []},
    'browse-data': {
        'positional': ['config'],
        '--out': None,
        '--text': False,
        '-n': 20,
        '--count': 20,
        '--indices': None,
        '--cfg-options': [],
    },
    'report': {'positional': ['work_dirs'], '--out': None, '--png': None, '-n': 100, '--count': 100},
    'convert pth_to_hf': {
        'positional': ['config', 'checkpoint', 'output'],
        '--max-shard-size': '5GB',
        '--dtype': None,
        '--fp32': None,
        '--device': 'auto',
        '--format': None,
    },
    'convert merge': {
        'positional': ['base', 'adapter', 'output'],
        '--is-clip': False,
        '--max-shard-size': '5GB',
        '--dtype': None,
        '--fp32': None,
        '--device': 'auto',
        '--format': None,
    },
    'convert quantize': {
        'positional': ['model', 'output'],
        '--method': None,
        '--data': None,
        '--samples': 128,
        '--max-length': 2048,
        '--group-size': 128,
    },
    'doctor': {'positional': [], '--json': False},
    'import-config': {'positional': ['source', 'output']},
    'verify-model': {'positional': ['path'], '--dtype': 'float32', '--device': 'auto', '--json': 'text'},
    'chat': {
        'positional': ['model'],
        '--adapter': None,
        '--llava': None,
        '--visual-encoder': None,
        '--visual-select-layer': -2,
        '--image': [],
        '--prompt': None,
        '--system': None,
        '--system-template': None,
        '--prompt-template': None,
        '--bot-name': None,
        '--example': [],
        '--no-streamer': False,
        '--stop-words': [],
        '--command-stop-word': None,
        '--answer-stop-word': None,
        '--max-new-tokens': 512,
        '--temperature': 0.0,
        '--top-p': 1.0,
        '--top-k': 0,
        '--repetition-penalty': 1.0,
        '--seed': None,
        '--bits': None,
        '--offload-folder': None,
        '--boxes': False,
        '--draw-boxes': None,
        '--lagent': False,
        '--with-plugins': None,
    },
    'demo': {
        'positional': ['model'],
        '--adapter': None,
        '--compare': None,
        '--examples': None,
        '--system': '',
        '--max-new-tokens': 512,
        '--bits': None,
        '--host': '127.0.0.1',
        '--port': 7860,
    },
    'export': {'positional': [], '--check': None, '--trained': None},
    'serve': {
        'positional': ['directory'],
        '--engine': 'transformers',
        '--host': '127.0.0.1',
        '--port': 8000,
        '--config': None,
        '--max-new-tokens': 512,
        '--no-check': True,
        '--print': False,
        '--engine-options': [],
    },
    'push': {'positional': ['directory', 'repository'], '--private': False, '--to': 'hub'},
    'list-cfg': {'positional': [], '-p': None, '--pattern': None},
    'copy-cfg': {'positional': ['name', 'directory']},
    'print-cfg': {'positional': ['config'], '--cfg-options': []},
}
DOORS = {
    'train': 'train',
    'test': 'test',
    'check_data': 'check-data',
    'browse_data': 'browse-data',
    'convert': 'convert',
    'pth_to_hf': 'convert pth_to_hf',
    'merge': 'convert merge',
    'verify_model': 'verify-model',
    'chat': 'chat',
    'list_cfg': 'list-cfg',
    'copy_cfg': 'copy-cfg',
    'print_cfg': 'print-cfg',
}


def verbs(parser, path=''):
    """{verb: parser} of every leaf."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return {path: parser}
    return {
        verb: leaf
        for name, child in inner[0].choices.items()
        for verb, leaf in verbs(child, f'{path} {name}'.strip()).items()
    }


def test_the_command_line_is_frozen():
    found = {}
    for verb, parser in verbs(build_parser()).items():
        found[verb] = {'positional': [action.dest for action in parser._actions if not action.option_strings]}
        for action in parser._actions:
            if action.dest not in ('help', 'debug'):
                found[verb] |= dict.fromkeys(action.option_strings, action.default)
    assert found == FROZEN


def test_doors_in_tools_are_the_verbs():
    tools = sorted(path for path in (ROOT / 'tools').glob('*.py') if path.stem != 'models_table')  # `make models`
    assert {path.stem for path in tools} == set(DOORS)
    for path in tools:
        run = subprocess.run(
            [sys.executable, str(path), '--help'],
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '120'},
        )
        assert run.stdout.startswith(f'usage: vlmtune {DOORS[path.stem]} '), run.stderr
        assert len(path.read_text().splitlines()) <= 60
