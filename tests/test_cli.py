"""What each verb passes on, how failures look, and what starts at once."""

import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

from vlmtune import __version__, recipes
from vlmtune.cli import build_parser, main
from vlmtune.utils.errors import DataError
from vlmtune.verbs.train import train_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def called(monkeypatch):
    """Stands in for the applications and records how they are called."""
    calls = []

    def stand_in(module, *functions):
        fake = types.ModuleType(f'vlmtune.apps.{module}')
        for name in functions:
            setattr(fake, name, lambda *args, name=name, **kwargs: calls.append((name, args, kwargs)))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

    stand_in('train', 'train')
    stand_in('data.check_data', 'check_data')
    stand_in('data.browse_data', 'browse_data')
    stand_in('export.convert', 'pth_to_hf')
    stand_in('export.merge', 'merge')
    stand_in('export.verify_model', 'verify_model')
    stand_in('chat', 'chat')
    monkeypatch.delenv('NPROC_PER_NODE', raising=False)
    return calls


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    path = tmp_path / 'configs' / 'tiny_lora.py'
    path.write_text('lr = 1\noptim_wrapper = dict(optimizer=dict(lr=lr))\n')
    monkeypatch.setattr(recipes, 'recipe_root', lambda: path.parent)
    return path


def test_train_passes_everything_on(called):
    line = 'train my.py --work-dir w --resume --cfg-options lr=1e-5 tune.llm=full --seed 3 --launcher slurm'
    assert main([*line.split(), '--deepspeed', 'deepspeed_zero2', '--dry-run', '--cfg-options', 'x=None']) == 0
    assert called == [
        (
            'train',
            ('my.py',),
            dict(
                work_dir='w',
                resume=True,
                overrides={'lr': 1e-5, 'tune.llm': 'full', 'x': None},
                seed=3,
                launcher='slurm',
                deepspeed='deepspeed_zero2',
                reset_optimizer=False,
                dry_run=True,
            ),
        )
    ]
    assert main(['train', 'my.py', '--resume', 'iter_5.pth']) == 0
    assert called[-1][2]['resume'] == 'iter_5.pth'
    assert main(['train', 'my.py']) == 0
    assert called[-1][2]['resume'] is False


def test_data_verbs_pass_everything_on(called):
    assert main('check-data my.py --json --decode --cfg-options max_length=9'.split()) == 0
    assert called[-1] == ('check_data', ('my.py',), dict(overrides={'max_length': 9}, as_json=True, decode=True))
    assert main('browse-data my.py --out p.html -n 3 --cfg-options lr=1'.split()) == 0
    assert called[-1] == ('browse_data', ('my.py',), dict(out='p.html', count=3, indices=None, overrides={'lr': 1}))
    assert main('browse-data my.py --text --indices 4 5'.split()) == 0
    assert called[-1] == ('browse_data', ('my.py',), dict(out=None, count=20, indices=[4, 5], overrides={}))


def test_check_data_gives_its_exit_code(called):
    sys.modules['vlmtune.apps.data.check_data'].check_data = lambda *args, **kwargs: 1
    assert main(['check-data', 'my.py']) == 1


def test_convert_and_chat_pass_everything_on(called):
    assert main('convert pth_to_hf c.py iter_1.pth out --fp32 --device cpu --format original'.split()) == 0
    options = dict(max_shard_size='5GB', dtype='float32', device='cpu', file_format='original')
    assert called[-1] == ('pth_to_hf', ('c.py', 'iter_1.pth', 'out'), options)
    assert main('convert merge base adapter out --dtype bfloat16 --max-shard-size 2GB'.split()) == 0
    options = dict(max_shard_size='2GB', dtype='bfloat16', device='auto', file_format=None)
    assert called[-1] == ('merge', ('base', 'adapter', 'out'), options)
    assert main('verify-model m --dtype auto --device cpu --json'.split()) == 0
    assert called[-1] == ('verify_model', ('m',), dict(dtype='auto', device='cpu', output='json'))
    line = 'chat m --adapter a --image 1.png 2.png --prompt hi --system s --max-new-tokens 9 --temperature 0.5'
    line += ' --top-p 0.9 --top-k 4 --seed 1 --bits 4 --image 3.png --boxes --draw-boxes b.png'
    line += ' --example p.png Read. @p.md --example q.png Read. Nothing.'
    line += (
        ' --llava l --visual-encoder v --visual-select-layer -3 --prompt-template chatml --bot-name Ada --no-streamer'
    )
    line += ' --stop-words a b --command-stop-word c --answer-stop-word d --repetition-penalty 1.1 --offload-folder o'
    assert main(line.split()) == 0
    assert called[-1][1:] == (
        (),
        dict(
            model='m',
            adapter='a',
            images=['1.png', '2.png', '3.png'],
            prompt='hi',
            system='s',
            examples=[['p.png', 'Read.', '@p.md'], ['q.png', 'Read.', 'Nothing.']],
            max_new_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            seed=1,
            bits=4,
            boxes=True,
            draw_boxes='b.png',
            llava='l',
            visual_encoder='v',
            visual_select_layer=-3,
            system_template=None,
            prompt_template='chatml',
            bot_name='Ada',
            no_streamer=True,
            stop_words=['a', 'b', 'c', 'd'],
            repetition_penalty=1.1,
            offload_folder='o',
        ),
    )


def test_options_of_xtuners_chat_that_are_left_out_say_why(called, capsys):
    for line, says in (('--lagent', 'serve the model'), ('--with-plugins search', 'belong to the MOSS models')):
        assert main(['chat', 'm', *line.split()]) == 1
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f'error: {line.split()[0]} is left out: ')
        assert says in told
    assert called == []


@pytest.mark.parametrize('line', ['--debug train x.py', 'train x.py --debug', 'train --debug x.py'])
def test_debug_is_understood_before_and_after_the_verb(line):
    assert build_parser().parse_args(line.split()).debug is True
    assert build_parser().parse_args(['train', 'x.py']).debug is False


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


@pytest.mark.parametrize(
    ('failure', 'code', 'message'),
    [
        (DataError('row 3 is empty'), 1, 'error: row 3 is empty\n'),
        (OSError(28, 'No space left on device'), 1, 'error: No space left on device; make room, or write elsewhere\n'),
        (ValueError('odd'), 1, 'error: ValueError: odd (run again with --debug for the traceback)\n'),
        (KeyboardInterrupt(), 130, 'error: interrupted\n'),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(called, capsys, failure, code, message):
    def fail(*args, **kwargs):
        raise failure

    sys.modules['vlmtune.apps.chat'].chat = fail
    assert main(['chat', 'm']) == code
    assert capsys.readouterr() == ('', message)
    assert main(['chat', 'm', '--debug']) == code
    assert ('Traceback' in capsys.readouterr().err) is (code == 1)


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


class TestSeveralProcesses:
    @pytest.fixture
    def launched(self, monkeypatch):
        found = []
        from vlmtune.apps import launch

        monkeypatch.setattr(launch, 'launch', lambda command, nproc, **_: found.append((nproc, list(command))) or 0)
        return found

    def test_nproc_starts_the_same_command_under_torchrun(self, called, launched, recipe):
        line = f'train {recipe} --nproc 2 --seed 3 --resume --deepspeed zero2 --work-dir w --dry-run --cfg-options lr=3'
        assert main(line.split()) == 0
        assert called == []
        ((nproc, command),) = launched
        assert nproc == 2
        assert main(command) == 0  # a launcher is given, so nothing is launched again
        expected = dict(
            work_dir='w',
            resume=True,
            overrides={'lr': 3},
            seed=3,
            launcher='pytorch',
            deepspeed='zero2',
            reset_optimizer=False,
            dry_run=True,
        )
        assert called == [('train', (str(recipe),), expected)]

    def test_the_variable_does_the_same(self, called, launched, recipe, monkeypatch, capsys):
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

    def test_nproc_and_a_launcher_exclude_each_other(self, called, recipe, capsys):
        assert main(['train', str(recipe), '--nproc', '2', '--launcher', 'slurm']) == 1
        assert capsys.readouterr().err == 'error: --nproc starts the processes itself; leave out --launcher slurm\n'

    def test_config_mistakes_are_told_once_before_anything_starts(self, called, launched, recipe, capsys):
        assert main(['train', str(recipe), '--nproc', '2', '--cfg-options', 'lrr=3']) == 1
        assert launched == []
        assert capsys.readouterr().err == "error: --cfg-options lrr: unknown name 'lrr', did you mean 'lr'?\n"

    def test_every_option_of_train_reaches_the_processes(self):
        """A new option has to be added to train_command."""
        line = ['train', 'c.py', '--resume', 'k', '--debug', '--cfg-options', 'a=1', 'b=2', '--dry-run']
        line += ['--work-dir', 'w', '--seed', '0', '--deepspeed', 'zero1', '--reset-optimizer']
        given = build_parser().parse_args(line)
        again = build_parser().parse_args(train_command(given))
        assert vars(again) == {**vars(given), 'launcher': 'pytorch'}

    def real_run(self, tmp_path, text):
        """torchrun really starts two processes; the config works for the command itself and fails for them."""
        path = tmp_path / 'failing.py'
        path.write_text(f"import os\nrank = os.environ.get('RANK')\n{text}\nload_from = value\n")
        command = [sys.executable, '-m', 'vlmtune', 'train', str(path), '--nproc', '2']
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)

    def test_a_failing_process_has_the_last_word(self, tmp_path):
        run = self.real_run(tmp_path, 'value = 1 / (rank is None)')
        assert run.returncode == 1
        assert 'failing.py:3: ZeroDivisionError: division by zero' in run.stderr.splitlines()[-1]
        assert 'Traceback' not in run.stderr

    @pytest.mark.slow
    def test_a_killed_process_is_named(self, tmp_path):
        run = self.real_run(tmp_path, "value = os.kill(os.getpid(), 9) if rank == '1' else None")
        assert run.returncode == 1
        assert 'error: process 1 of 2 was ended by SIGKILL, as the system does when memory is short' in run.stderr


def test_version_help_list_and_refusals_are_quick_and_import_nothing_heavy():
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
    start = time.perf_counter()
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 1.0
    version = subprocess.run([sys.executable, '-m', 'vlmtune', '--version'], capture_output=True, text=True, cwd=ROOT)
    assert version.stdout == f'vlmtune {__version__}\n'


def test_a_closed_pipe_is_no_failure(recipe):
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    command = f'{sys.executable} -m vlmtune print-cfg {recipe} | true'
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stderr == ''


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
