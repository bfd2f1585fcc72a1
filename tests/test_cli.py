"""How failures look, what is imported when nothing heavy is asked for, and what is not shown."""

import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from vlmtune import __version__
from vlmtune.cli import build_parser, main
from vlmtune.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('line', ['--debug train x.py', 'train x.py --debug', 'train --debug x.py'])
def test_debug_is_understood_before_and_after_the_verb(line):
    assert build_parser().parse_args(line.split()).debug is True
    assert build_parser().parse_args(['train', 'x.py']).debug is False


@pytest.mark.parametrize(
    ('failure', 'code', 'message'),
    [
        (DataError('row 3 is empty'), 1, 'error: row 3 is empty\n'),
        (OSError(28, 'No space left on device'), 1, 'error: No space left on device; make room, or write elsewhere\n'),
        (
            PermissionError(13, 'Permission denied', '/x/runs'),
            1,
            'error: Permission denied (/x/runs); change who may read and write there, or choose another place\n',
        ),
        (
            PermissionError(1, 'Operation not permitted'),  # no file: a port, a process
            1,
            'error: PermissionError: [Errno 1] Operation not permitted (run again with --debug for the traceback)\n',
        ),
        (OSError(36, 'File name too long', 'x'), 1, 'error: File name too long (x); give a shorter one\n'),
        (ValueError('odd'), 1, 'error: ValueError: odd (run again with --debug for the traceback)\n'),
        (KeyboardInterrupt(), 130, 'error: interrupted\n'),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(monkeypatch, capsys, failure, code, message):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setitem(sys.modules, 'vlmtune.apps.chat', types.SimpleNamespace(chat=fail))
    assert main(['chat', 'm']) == code
    assert capsys.readouterr() == ('', message)
    assert main(['chat', 'm', '--debug']) == code
    assert ('Traceback' in capsys.readouterr().err) is (code == 1)


def test_a_home_of_nobody_is_told(capsys):
    assert main(['import-config', '~nobody-of-this-name/x.py', 'y.py']) == 1
    says = 'a path begins with ~ and a user that this machine does not know; write ~/ or the whole path'
    assert capsys.readouterr().err == f'error: {says}\n'


def test_a_wrong_command_line_is_one_line(capsys):
    for line, says in [
        ('train', 'the following arguments are required: CONFIG; see `vlmtune train --help`'),
        ('trian x', "invalid choice: 'trian'"),
        ('train x --nproc zero', "expected a positive integer, got 'zero'"),
        ('train x --cfg-opt lr=1', 'unrecognized arguments'),
        ('chat m --bits 5', 'invalid choice: 5'),
        ('chat m --system s --system-template sql', 'not allowed with'),
        ('browse-data x', 'one of the arguments --out --text is required'),
        ('browse-data x --out p --text', 'not allowed with'),
        ('convert pth_to_hf a b c --fp32 --dtype float16', 'not allowed with'),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.startswith('error: ')
        assert err.count('\n') == 1


def test_version_help_list_and_refusals_import_nothing_heavy():
    refused = [
        ['convert', 'pth_to_hf', 'config', 'iter_1.pth', 'tests'],
        ['convert', 'merge', 'base', 'adapter', 'new', '--max-shard-size', 'much'],
        ['convert', 'quantize', 'model', 'tests', '--method', 'awq'],
    ]
    code = (
        'import sys; from vlmtune.cli import build_parser, main; build_parser().format_help(); '
        f'main(["list-cfg", "-p", "*"]); assert all(main(verb) == 1 for verb in {refused}); '
        'heavy = {"torch", "mmengine", "transformers", "numpy"} & set(sys.modules); assert not heavy, heavy'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    version = subprocess.run([sys.executable, '-m', 'vlmtune', '--version'], capture_output=True, text=True, cwd=ROOT)
    assert version.stdout == f'vlmtune {__version__}\n'


@pytest.mark.parametrize(
    ('message', 'kind'),
    [
        (
            '`torch.distributed.reduce_scatter_tensor` is deprecated. Please use '
            '`torch.distributed.reduce_scatter_single` instead.',
            FutureWarning,
        ),
        ('Detected call of `scheduler.step()` before `optimizer.step()`. In PyTorch 1.1.0 and later', UserWarning),
    ],
)
def test_what_deepspeed_makes_others_warn_of_is_not_shown(message, kind, capsys):
    """At every step and on every rank of ZeRO-3, the first one."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('always')
        assert main(['list-cfg']) == 0
        warnings.warn(message, kind, stacklevel=1)
        assert shown == []
