"""What a start of a run writes is its own."""

import logging
import signal
import time

import pytest
from mmengine.logging import MessageHub

from vlmtune.engine.signals import Stopped

ONE_STEP = dict(max_steps=1, max_epochs=None)


def seconds(count):
    """The names of this second and of those that follow, as mmengine names a start."""
    return [time.strftime('%Y%m%d_%H%M%S', time.localtime(time.time() + n)) for n in range(count)]


def test_a_run_writes_the_list_of_bad_samples(run):
    work_dir = run('done', **ONE_STEP)
    assert (work_dir / 'bad_samples.jsonl').read_text() == ''


def test_two_starts_of_one_second_have_a_log_folder_each(run, tmp_path):
    earlier = {tmp_path / 'a' / name for name in seconds(3)}
    for folder in earlier:
        folder.mkdir(parents=True)
    work_dir = run('a', **ONE_STEP)
    (own,) = {path.parent for path in work_dir.glob('*/parts.json')}
    assert own not in earlier
    assert [path.name for path in own.glob('*.log')] == [f'{own.name}.log']
    assert not any(list(folder.iterdir()) for folder in earlier)


def test_two_starts_of_one_second_in_one_process_have_scalars_each(run):
    """Though each has a work dir of its own."""
    earlier = [f'same_{name}' for name in seconds(3)]
    for name in earlier:
        MessageHub.get_instance(name)
    run('a', recipe=dict(name='same'), **ONE_STEP)
    assert MessageHub.get_current_instance().instance_name.startswith('same_')
    assert MessageHub.get_current_instance().instance_name not in earlier


def test_a_log_file_takes_no_lines_of_later_runs(run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        (file,) = run('a', **ONE_STEP).glob('*/*.log')
        text = file.read_text()
        assert 'device cpu' in text
        assert f'done: {file.parent.parent}' in text
        run('b', **ONE_STEP)
        assert file.read_text() == text


def test_a_log_file_takes_no_lines_after_a_run_that_did_not_end_well(validated, tmp_path, caplog):
    marker = str(tmp_path / 'marker')
    more = 'from validation_hooks import Interrupt\n'
    more += f'custom_hooks += [dict(type=Interrupt, at=2, marker={marker!r}, number={int(signal.SIGTERM)})]\n'
    with caplog.at_level('INFO', 'vlmtune'):
        with pytest.raises(Stopped):
            validated('a', more=more, max_steps=4, max_epochs=None)
        (file,) = tmp_path.glob('a/*/*.log')
        text = file.read_text()
        assert 'device cpu' in text
        logging.getLogger('vlmtune').error('of nobody')
        assert file.read_text() == text
