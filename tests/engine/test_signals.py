"""SIGTERM, SIGUSR1 and Ctrl-C in one process: noted in training, obeyed at once elsewhere."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from vlmtune.engine import Runner, ranks, signals
from vlmtune.engine.signals import SIGNALS, Stopped, StopSignals, check_requeue_exit_code, leave_at_once
from vlmtune.utils.errors import ConfigError


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ('number', 'flags', 'code', 'word'),
    [
        (signal.SIGTERM, [1, 0, 0], 143, 'SIGTERM'),
        (signal.SIGUSR1, [0, 1, 0], 85, 'SIGUSR1'),
        (signal.SIGINT, [0, 0, 1], 130, 'Ctrl-C'),
    ],
)
def test_a_signal_is_noted_and_ends_the_run_when_it_is_saved(number, flags, code, word, capfd):
    with StopSignals(requeue_exit_code=85) as stop:
        assert stop.flags() == [0, 0, 0]
        assert stop.asked([0, 0, 0]) is None
        send(number)
        send(number)  # handed on by a launcher as well
        assert stop.flags() == flags
        assert stop.asked([2 * flag for flag in flags]) == number
        with pytest.raises(Stopped, match=f'stopped by {word} after step 7; saved in x/iter_7.pth') as stopped:
            stop.leave_saved(number, iteration=7, checkpoint='x/iter_7.pth')
        assert stopped.value.exit_code == code
    err = capfd.readouterr().err
    assert err.count(f'{word}: will save and leave after this step; a second one leaves at once') == 1


def test_ranks_whose_launcher_was_killed_save_and_leave(monkeypatch, capfd):
    channel = SimpleNamespace(parent=os.getppid())
    monkeypatch.setattr(ranks._Joined, 'channel', channel)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    with StopSignals() as stop:
        assert stop.flags() == [0, 0, 0]
        channel.parent += 1
        assert stop.flags() == stop.flags() == [1, 0, 0]
    assert capfd.readouterr().err.count('the launcher has died') == 1


def test_a_parent_that_is_no_launcher_may_end(monkeypatch):
    """srun's steps, and what nohup has started."""
    monkeypatch.setattr(ranks._Joined, 'channel', SimpleNamespace(parent=-1))
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    with StopSignals() as stop:
        assert stop.flags() == [0, 0, 0]


def test_without_a_requeue_code_sigusr1_is_as_sigterm():
    with pytest.raises(Stopped) as stopped:
        StopSignals().leave_saved(signal.SIGUSR1, iteration=1, checkpoint='x')
    assert stopped.value.exit_code == 143


def in_a_child(function):
    """The exit code of a forked process that runs it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_leaves_at_once(monkeypatch, capfd):
    monkeypatch.setattr(signals, 'ECHO', -1.0)  # nothing is the echo of what came before

    def impatient():
        with StopSignals(requeue_exit_code=85):
            send(signal.SIGUSR1)
            send(signal.SIGINT)
            os._exit(0)

    assert in_a_child(impatient) == 130
    assert 'a second signal (Ctrl-C): left at once, nothing more was saved' in capfd.readouterr().err


def test_children_do_not_take_part():
    """A forked worker ends by SIGTERM, and is not bothered by what the terminal sends to all."""
    with StopSignals():
        assert in_a_child(lambda: (send(signal.SIGINT), send(signal.SIGUSR1), os._exit(7))) == 7
        assert in_a_child(lambda: (send(signal.SIGTERM), os._exit(7))) == -signal.SIGTERM


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_where_there_is_nothing_to_save_it_leaves_at_once(number, code):
    def planning():
        with leave_at_once() as leaving:
            leaving.requeue_exit_code = 85
            try:
                send(number)
            except Exception:  # as code that is under way may do
                pytest.fail('this must not be caught')

    with pytest.raises(Stopped, match='no step was under way, nothing was saved') as stopped:
        planning()
    assert stopped.value.exit_code == code


def test_one_of_several_ends_on_the_spot(monkeypatch):
    monkeypatch.setattr(signals.ranks, 'several', lambda: True)

    def planning():
        with leave_at_once():
            send(signal.SIGTERM)

    assert in_a_child(planning) == 143


@pytest.mark.parametrize('code', ['85', 256, -1, True, 1.0])
def test_the_requeue_code_has_to_be_one(code):
    with pytest.raises(ConfigError, match='requeue_exit_code=.* expected a number from 0 to 255, or None for 143'):
        check_requeue_exit_code(Config(dict(requeue_exit_code=code)))
    check_requeue_exit_code(Config(dict(requeue_exit_code=85)))
    check_requeue_exit_code(Config())


def test_what_a_signal_has_saved_goes_on_as_if_nothing_had_been(run, contents, differences, monkeypatch):
    settings = dict(max_epochs=None, max_steps=6)
    whole = run('whole', **settings)
    call_hook = Runner.call_hook

    def call_and_send(runner, name, **kwargs):
        if name == 'before_train_iter' and runner.iter == 2:
            send(signal.SIGTERM)
        call_hook(runner, name, **kwargs)

    monkeypatch.setattr(Runner, 'call_hook', call_and_send)
    with pytest.raises(Stopped, match='stopped by SIGTERM after step 4; saved in'):
        run('stopped', **settings)
    stopped = run('stopped', resume=True, **settings)
    assert (stopped / 'iter_4.pth').is_dir()
    assert differences(contents(whole / 'iter_6.pth'), contents(stopped / 'iter_6.pth')) == []


def test_ctrl_c_saves_and_says_how_to_go_on(write_recipe, tmp_path):
    recipe = write_recipe(tmp_path / 'recipe.py')
    options = ['max_epochs=None', 'max_steps=400', 'dataloader_num_workers=2']
    command = [sys.executable, '-m', 'vlmtune', 'train', str(recipe), '--work-dir', str(tmp_path / 'stopped')]
    process = subprocess.Popen(
        [*command, '--cfg-options', *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search('step +2/400', line):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, ''.join(lines)
    (saved,) = (tmp_path / 'stopped').glob('iter_*.pth')
    assert lines[-2] == f'stopped by Ctrl-C after step {saved.stem.removeprefix("iter_")}; saved in {saved}\n'
    assert lines[-1].startswith('to go on: vlmtune train ')
    assert lines[-1].endswith(f' --resume --cfg-options {" ".join(options)}\n')
