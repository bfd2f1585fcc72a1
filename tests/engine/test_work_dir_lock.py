"""A work dir belongs to one run at a time."""

import os
import subprocess
import sys

import pytest

from vlmtune.engine.work_dir_lock import only_run_in
from vlmtune.utils.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from vlmtune.engine.work_dir_lock import only_run_in
with only_run_in(Path(sys.argv[1]), rank=0):
    print('held', flush=True)
    time.sleep(1000)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(run, tmp_path):
    """A process forked by the first, as data workers are, does not keep it."""
    forking = HOLD.replace('print(', 'import os; os.fork() or time.sleep(1000); print(')
    first = subprocess.Popen(
        [sys.executable, '-c', forking, str(tmp_path / 'run')],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert first.stdout is not None
    assert first.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match=r'another run is at work in .*run: wait for its end, or choose another'):
        run('run', max_steps=1, max_epochs=None)
    assert not list((tmp_path / 'run').glob('iter_*'))
    os.kill(first.pid, 9)
    first.wait()
    try:
        run('run', max_steps=1, max_epochs=None)
    finally:
        os.killpg(first.pid, 9)  # the forked one


def test_it_is_free_again_after_a_run_that_failed(tmp_path):
    with pytest.raises(ValueError, match='made up'), only_run_in(tmp_path, rank=0):
        raise ValueError('made up')
    done = subprocess.run(
        [sys.executable, '-c', HOLD.replace('time.sleep(1000)', ''), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout == 'held\n', done.stderr
