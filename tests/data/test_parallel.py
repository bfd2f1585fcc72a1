"""Ranges go through worker processes and come back in order; whatever ends a worker reaches the caller."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from tests.waiting import until
from vlmtune.data import parallel
from vlmtune.data.parallel import CHUNK, default_workers, map_chunks
from vlmtune.utils.errors import DataError, UserError

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='workers are forked')


class OwnError(Exception):
    def __init__(self, a, b):  # cannot be made again from its arguments
        super().__init__(f'{a} {b}')


def work(numbers):
    return os.getpid(), list(numbers)


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_results_are_in_order(workers):
    overtaken = multiprocessing.get_context('fork').Event()

    def late_at_first(numbers):
        if numbers.start == 7:
            overtaken.set()
        assert numbers.start > 0 or workers < 2 or overtaken.wait(60)
        return work(numbers)

    results = list(map_chunks(late_at_first, 100, workers=workers, chunk=7))
    assert [n for _, numbers in results for n in numbers] == list(range(100))
    pids = {pid for pid, _ in results}
    assert (pids == {os.getpid()}) if workers == 0 else (os.getpid() not in pids and len(pids) <= workers)


def test_nothing_to_do():
    assert list(map_chunks(work, 0, workers=2)) == []


def test_few_ranges_are_ahead_of_the_caller(tmp_path, monkeypatch):
    """Memory is bounded: at most two ranges for every worker are worked on before the first result is taken."""
    idle, wait = multiprocessing.get_context('fork').Event(), parallel.wait

    def note(numbers):
        (tmp_path / str(numbers.start)).touch()
        assert numbers.start > 0 or idle.wait(60)  # until the other worker has got all that it gets

    def watch(busy):
        if len(busy) == 1:
            idle.set()
        return wait(busy)

    monkeypatch.setattr(parallel, 'wait', watch)
    results = map_chunks(note, 100, workers=2, chunk=1)
    next(results)
    assert len(list(tmp_path.iterdir())) <= 4
    results.close()


def test_large_results_do_not_block():
    total = sum(len(piece) for piece in map_chunks(lambda numbers: b'x' * 500_000, 20, workers=2, chunk=1))
    assert total == 10_000_000


def test_user_errors_arrive_as_they_are():
    def fail(numbers):
        if 30 in numbers:
            raise DataError('row 30 is broken', kind='missing_image')
        return numbers

    with pytest.raises(DataError, match='^row 30 is broken$') as error:
        list(map_chunks(fail, 100, workers=2, chunk=10))
    assert error.value.kind == 'missing_image'


def test_other_errors_arrive_with_the_workers_traceback():
    def fail(numbers):
        return {}[numbers.start]

    with pytest.raises(KeyError) as error:
        list(map_chunks(fail, 100, workers=2, chunk=10))
    assert 'in fail' in error.value.__notes__[0]

    def fail_oddly(numbers):
        raise OwnError(1, 2)

    with pytest.raises(RuntimeError, match='OwnError: 1 2'):
        list(map_chunks(fail_oddly, 100, workers=2, chunk=10))


def test_a_killed_worker_is_an_error():
    def die(numbers):
        if 30 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbers

    with pytest.raises(UserError, match=r'signal 9 \(SIGKILL\) while it worked on rows 30 to 39.*planning_workers'):
        list(map_chunks(die, 100, workers=2, chunk=10))


def is_alive(pid):
    try:
        return 'Z' not in open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]
    except OSError:
        return False


def endless(folder):
    os.setsid()  # a process group of its own, as a terminal makes one

    def note(numbers):
        (folder / str(os.getpid())).touch()
        time.sleep(0.01)  # its parent has work for hours

    list(map_chunks(note, 10**6, workers=2, chunk=1))


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(how, tmp_path):
    """Ctrl-C reaches the whole group; a parent that is killed can tell nobody."""
    parent = multiprocessing.get_context('fork').Process(target=endless, args=(tmp_path,))
    parent.start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    os.killpg(parent.pid, how) if how == signal.SIGINT else parent.kill()
    parent.join(60)
    assert parent.exitcode == (1 if how == signal.SIGINT else -how)  # 1: KeyboardInterrupt
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize('setting', [None, 'true', 'false'])
def test_tokenizers_work_after_a_fork(setting, processor, capfd, monkeypatch):
    monkeypatch.delenv('TOKENIZERS_PARALLELISM', raising=False)
    if setting is not None:
        monkeypatch.setenv('TOKENIZERS_PARALLELISM', setting)
    tokenizer = processor('qwen2').tokenizer
    tokenizer(['a b c'] * 100)  # with threads, if they are not off
    lengths = list(map_chunks(lambda numbers: len(tokenizer(['a b'] * 9)['input_ids']), 4, workers=2, chunk=1))
    assert lengths == [9] * 4
    assert 'fork' not in capfd.readouterr().err
    assert os.environ.get('TOKENIZERS_PARALLELISM') == setting


def test_few_rows_need_no_workers():
    assert default_workers(CHUNK) == default_workers(0) == 0
    assert default_workers(10**9) in (0, *range(2, 33))
