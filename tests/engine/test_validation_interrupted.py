"""A validation that is killed or stopped goes on when the run is resumed, and the run ends with the same bits."""

import json
import shutil
import signal

import pytest

from vlmtune.engine.signals import Stopped

WHOLE = dict(max_steps=6, max_epochs=None, val_interval=2, save_steps=1, save_best='val/loss')
SHORT = dict(max_steps=4, max_epochs=None)


def interrupt(**settings):
    given = ', '.join(f'{name}={value!r}' for name, value in settings.items())
    return f'from validation_hooks import Interrupt\ncustom_hooks += [dict(type=Interrupt, {given})]\n'


def records(work_dir):
    return [json.loads(line) for line in (work_dir / 'validation.jsonl').read_text().splitlines()]


def predictions(work_dir, step):
    path = work_dir / 'validation' / f'iter_{step}' / 'predictions.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]


def validations(checkpoint):
    return json.loads((checkpoint / 'trainer.json').read_text())['validations']


@pytest.fixture(scope='module')
def whole(write_validated, warm_ranks, tmp_path_factory):
    """What the last checkpoint and validation.jsonl of a run hold that nothing interrupts."""
    folder = tmp_path_factory.mktemp('whole')
    ended = warm_ranks.run(1, config=write_validated('whole'), work_dir=folder, overrides=WHOLE)
    assert ended.codes == [0], ended.said
    return folder


def comparable(work_dir):
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in records(work_dir)]


MOMENTS = [
    pytest.param(0, id='before the loss', marks=pytest.mark.slow),
    pytest.param(2, id='in the loss'),
    pytest.param(9, id='in the answers'),
]


@pytest.mark.parametrize('call', MOMENTS)
def test_a_kill_in_the_middle_of_a_validation(
    call, whole, write_validated, warm_ranks, contents, differences, tmp_path
):
    """The run that resumes validates first, does not ask again what was answered, and ends with the same bits."""
    more = interrupt(at=4, marker=str(tmp_path / 'marker'), number=int(signal.SIGKILL), call=call)
    path, work_dir = write_validated(tmp_path.name, more=more), tmp_path / 'killed'
    killed = warm_ranks.run(1, config=path, work_dir=work_dir, overrides=WHOLE)
    assert killed.codes == [-signal.SIGKILL], killed.said
    assert [row['iteration'] for row in records(work_dir)] == [2]
    parts = list((work_dir / 'validation' / 'iter_4').glob('*.part0'))
    answered = [json.loads(line) for part in parts for line in part.read_text().splitlines()[1:]]
    assert bool(answered) == (call == 9)
    resumed = warm_ranks.run(1, config=path, work_dir=work_dir, resume=True, overrides=WHOLE)
    assert resumed.codes == [0], resumed.said
    assert comparable(work_dir) == comparable(whole)
    again = {row['index']: row['seconds'] for row in predictions(work_dir, 4)}
    assert {row['index']: row['seconds'] for row in answered}.items() <= again.items()
    assert differences(contents(work_dir / 'iter_6.pth'), contents(whole / 'iter_6.pth')) == []
    assert (work_dir / 'best_checkpoint').read_text() == (whole / 'best_checkpoint').read_text()


@pytest.mark.parametrize('step', [3, 4], ids=['between validations', 'at one'])
def test_a_resumed_run_ends_with_the_same_bits(
    step, whole, write_validated, warm_ranks, contents, differences, tmp_path
):
    """Answers and lines behind the checkpoint are of a run that is abandoned."""
    work_dir = tmp_path / 'resumed'
    shutil.copytree(whole, work_dir, ignore=lambda _, names: [f'iter_{n}.pth' for n in range(step + 1, 7)])
    shutil.copytree(whole / 'validation' / 'iter_6', work_dir / 'validation' / 'iter_99')
    path = write_validated(tmp_path.name)
    resumed = warm_ranks.run(1, config=path, work_dir=work_dir, resume=True, overrides=WHOLE)
    assert resumed.codes == [0], resumed.said
    assert comparable(work_dir) == comparable(whole)
    assert differences(contents(work_dir / 'iter_6.pth'), contents(whole / 'iter_6.pth')) == []
    assert sorted(path.name for path in (work_dir / 'validation').glob('iter_*')) == ['iter_2', 'iter_4', 'iter_6']


@pytest.mark.parametrize('call', [0, 5])
def test_a_signal_in_the_middle_of_a_validation(call, validated, contents, differences, tmp_path):
    """The step is saved, though no checkpoint is due, and answers are; the run that resumes validates first."""
    more = interrupt(at=2, marker=str(tmp_path / 'marker'), number=int(signal.SIGTERM), call=call)
    with pytest.raises(Stopped, match=r'stopped by SIGTERM after step 2; saved in .*iter_2.pth'):
        validated('stopped', more=more, **SHORT)
    assert not (tmp_path / 'stopped' / 'validation.jsonl').exists()
    assert validations(tmp_path / 'stopped' / 'iter_2.pth') == []
    left = sorted(path.name for path in (tmp_path / 'stopped' / 'validation').glob('iter_2/*'))
    assert left == (['predictions.jsonl.part0'] if call else [])
    work_dir = validated('stopped', more=more, resume=True, **SHORT)
    assert [row['iteration'] for row in records(work_dir)] == [2, 4]
    undisturbed = validated('whole', **SHORT)
    assert differences(contents(work_dir / 'iter_4.pth'), contents(undisturbed / 'iter_4.pth')) == []


def test_a_run_that_goes_on_longer_keeps_its_last_validation(validated, tmp_path):
    """It came behind the last save, and its step is the best still."""
    more = 'from validation_hooks import Told\ncustom_hooks += [dict(type=Told, at_2=8.0, at_3=1.0, at_4=9.0)]\n'
    settings = dict(max_epochs=None, val_interval=2, save_best='val/loss')
    work_dir = validated('longer', more=more, max_steps=3, **settings)
    with (work_dir / 'validation.jsonl').open('ab') as file:
        file.write('{"iteration": 4, "é'.encode()[:-1])  # cut by a kill inside of a character
    validated('longer', more=more, resume=True, max_steps=4, **settings)
    assert [row['iteration'] for row in records(work_dir)] == [2, 3, 4]
    assert (work_dir / 'best_checkpoint').read_text() == 'iter_3.pth\n'


def test_a_run_without_validation_hands_on_those_before_it(validated, tmp_path):
    """Also where the path to resume from is spelled in another way."""
    more = 'from validation_hooks import Told\ncustom_hooks += [dict(type=Told, at_2=1.0, at_4=8.0, at_6=9.0)]\n'
    settings = dict(max_epochs=None, save_steps=2, save_best='val/loss')
    validated('longer', more=more, max_steps=4, val_interval=2, **settings)
    without = {**settings, 'val_dataloader': None, 'save_best': None}
    path = tmp_path / 'longer' / '..' / 'longer' / 'iter_4.pth'
    validated('longer', more=more, resume=str(path), max_steps=5, **without)
    work_dir = validated('longer', more=more, resume=True, max_steps=6, val_interval=3, **settings)
    assert [row['iteration'] for row in records(work_dir)] == [2, 4, 6]
    assert [row['iteration'] for row in validations(work_dir / 'iter_6.pth')] == [2, 4]
    assert (work_dir / 'best_checkpoint').read_text() == 'iter_2.pth\n'
