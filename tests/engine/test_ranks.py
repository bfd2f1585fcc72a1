"""Ranks that fail, die, stop or sleep: what the others are told, and when.

One process imports everything, forks the ranks of all cases, and lets them run side by side, for most of a case is
waiting.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from vlmtune.engine import ranks
from vlmtune.engine.ranks import Bounds
from vlmtune.engine.setup import init_distributed
from vlmtune.utils.errors import DataError

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])
NEVER = 1000  # seconds
BOUNDS = dict(last_sleeps=Bounds(NEVER, 5), last_sleeps_in_a_step=Bounds(3, NEVER), last_is_stopped=Bounds(3, NEVER))

def until(happened):
    end = time.monotonic() + 550
    while not happened():
        assert time.monotonic() < end, sorted(path.name for path in FOLDER.iterdir())
        time.sleep(0.02)


def counting(rank):
    assert ranks.total([1, rank, 0.5], what='step 1') == [3, 3, 1.5]
    assert ranks.gather({'rank': rank}, what='comparing') == [{'rank': r} for r in range(3)]
    with ranks.together('planning'):
        pass
    return 'fine'

def last_sleeps(rank):
    ranks.note('loading weights')
    if rank == 2:
        time.sleep(1000)
    ranks.gather(rank, what='saving')

def last_sleeps_in_a_step(rank):
    ranks.note('loading the data of iteration 7')
    if rank == 2:
        time.sleep(1000)
    ranks.total([1], what='counting the tokens of iteration 7')

def last_is_stopped(rank):
    ranks.note('learning iteration 3')
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.total([1], what='counting')

def last_is_killed(rank):
    ranks.note('loading weights')
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(1, what='saving')

def first_is_killed(rank):
    ranks.note('loading weights')
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(1, what='saving')

def first_is_killed_with_torchrun(rank):
    first_is_killed(rank)

def first_is_killed_when_all_have_come(rank):
    if rank == 0:
        with ranks._bounded('saving', NEVER):
            os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(1, what='saving')

def torchrun_is_killed_with_torchrun(rank):
    ranks.total([1], what='step 1')
    if rank == 0:
        os.kill(AGENT, signal.SIGKILL)
        until(lambda: Path(f'/proc/{AGENT}/stat').read_text().rpartition(')')[2].split()[0] == 'Z')
    ranks.note('step 2')
    return ranks.total([1], what='step 2')

def one_has_bad_data(rank):
    with ranks.together('planning the data'):
        if rank == 1:
            raise DataError('row 3 is empty')

def all_have_bad_data(rank):
    with ranks.together('planning the data'):
        raise DataError('row 3 is empty')

def two_have_bad_data(rank):
    with ranks.together('planning the data'):
        if rank:
            raise DataError(f'row {rank} is empty')

def a_bug(rank):
    with ranks.together('planning the data'):
        return 1 / (1 - rank)

def one_leaves_with_an_error(rank):
    if rank == 1:
        ranks.tell(DataError('image 3 is gone'))
        raise DataError('image 3 is gone')
    ranks.total([1], what='counting')

def a_signal_ends_the_wait(rank):
    class Enough(BaseException): pass
    def enough(*_): raise Enough('signal')
    if rank == 1:
        until(lambda: all((FOLDER / f'a_signal_ends_the_wait.{other}').exists() for other in (0, 2)))
        return 'late'
    signal.signal(signal.SIGALRM, enough)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        ranks.gather(1, what='saving')
    except Enough:
        return 'enough'

def linger_for_the_first(rank):
    error = DataError('same')
    try:
        with ranks.together('planning the data'):
            raise error
    except DataError:
        ranks.linger(speaks=rank == 0, seconds=NEVER)

CASES = [value for value in list(globals().values()) if getattr(value, '__module__', '') == '__main__'
         and callable(value)]

def report(case, rank, **found):
    (FOLDER / f'{case.__name__}.{rank}').write_text(json.dumps(found))

def be_a_rank(case, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='3', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    if case.__name__.endswith('with_torchrun'):
        os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'True'
    bounds = BOUNDS.get(case.__name__, Bounds(NEVER, NEVER))
    init_distributed('pytorch', bounds=bounds)
    ranks.gather(0, what='meeting') if bounds.step < NEVER else ranks.total([0], what='meeting')
    start = time.monotonic()
    try:
        found = dict(result=case(rank))
    except Exception as error:
        found = dict(kind=type(error).__name__, message=str(error), told=getattr(error, 'told_by_first_rank', None))
    report(case, rank, seconds=time.monotonic() - start, ended=time.time(), **found)
    if rank == 0 and case is not linger_for_the_first:
        signal.pause()  # who leaves takes the store along

def free_port():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def fork(function, *arguments):
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return child

def hold_store(port):
    store = dist.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)
    signal.pause()

def run(cases):
    global AGENT
    children, agents, expected = [], [], 0
    for case in cases:
        port, AGENT = free_port(), None
        if case.__name__.endswith('with_torchrun'):
            AGENT = fork(hold_store, port)
            agents.append(AGENT)
        children += [fork(be_a_rank, case, rank, port) for rank in range(3)]
        expected += 2 if case.__name__ in ONE_IS_SILENT else 3
    names = {case.__name__ for case in cases}
    until(lambda: expected <= sum(path.name.split('.')[0] in names for path in FOLDER.iterdir()))
    for child in [*children, *agents]:
        os.kill(child, signal.SIGKILL)  # those that have ended are not waited for, so their numbers are still theirs
    for child in [*children, *agents]:
        os.waitpid(child, 0)

for at in range(0, len(CASES), 4):
    run(CASES[at : at + 4])
"""
SILENT = [
    'last_sleeps', 'last_sleeps_in_a_step', 'last_is_stopped', 'last_is_killed', 'first_is_killed',
    'first_is_killed_with_torchrun', 'first_is_killed_when_all_have_come',
]  # fmt: skip


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    """``outcome('counting')``: what each of the three ranks has to report; {} of one that could not."""
    folder = tmp_path_factory.mktemp('ranks')
    script = f'ONE_IS_SILENT = {SILENT}\n' + SCRIPT
    done = subprocess.run([sys.executable, '-c', script, str(folder)], timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def read(case):
        paths = [folder / f'{case}.{rank}' for rank in range(3)]
        return [json.loads(path.read_text()) if path.exists() else {} for path in paths]

    return read


def test_values_of_all_ranks(outcome):
    assert [rank.get('result') for rank in outcome('counting')] == ['fine'] * 3


@pytest.mark.parametrize(
    ('case', 'bound', 'message'),
    [
        ('last_sleeps', 5, 'rank 2 (last heard # s ago: loading weights) did not finish saving within 5 s'),
        (
            'last_sleeps_in_a_step',
            3,
            'rank 2 (last heard # s ago: loading the data of iteration 7) did not finish '
            'counting the tokens of iteration 7 within 3 s',
        ),
        ('last_is_stopped', 3, 'rank 2 is stopped (last heard # s ago: learning iteration 3); seen by rank'),
        ('last_is_killed', 0, 'rank 2 has died (last heard # s ago: loading weights); seen by rank'),
    ],
)
def test_the_missing_rank_is_named_by_all_others(outcome, case, bound, message):
    before, behind = message.split('#')
    for rank in outcome(case)[:2]:
        assert rank['kind'] == 'RankMissing'
        assert rank['message'].startswith(before)
        assert behind in rank['message']
        assert rank['seconds'] >= bound


@pytest.mark.parametrize(
    ('case', 'message'),
    [
        ('first_is_killed', 'rank 0 has died; seen by rank'),  # and the notes with it
        ('first_is_killed_with_torchrun', 'rank 0 has died (last heard'),
        ('first_is_killed_when_all_have_come', 'rank 0 has died; seen by rank'),
    ],
)
def test_the_first_rank_may_be_the_missing_one(outcome, case, message):
    for rank in outcome(case)[1:]:
        assert rank['kind'] == 'RankMissing'
        assert rank['message'].startswith(message)


def test_ranks_do_not_need_torchrun_to_go_on(outcome):
    assert [rank.get('result') for rank in outcome('torchrun_is_killed_with_torchrun')] == [[3.0]] * 3


def test_what_fails_on_one_rank_fails_on_all_and_the_first_says_why(outcome):
    first, second, third = outcome('one_has_bad_data')
    failed = dict(kind='RankFailed', message='rank 1 failed while planning the data: row 3 is empty', told=True)
    assert failed.items() <= first.items()
    assert failed.items() <= third.items()
    assert dict(kind='DataError', message='row 3 is empty', told=True).items() <= second.items()


def test_what_fails_on_all_ranks_is_told_by_the_first_and_other_failures_by_their_own(outcome):
    for rank in outcome('all_have_bad_data'):
        assert dict(kind='DataError', message='row 3 is empty', told=True).items() <= rank.items()
    first, second, third = outcome('two_have_bad_data')
    assert first['message'] == 'rank 1 failed while planning the data: row 1 is empty'
    assert (second['told'], third['message'], third['told']) == (True, 'row 2 is empty', False)
    first, second, _ = outcome('a_bug')
    assert first['message'] == 'rank 1 failed while planning the data: ZeroDivisionError: division by zero'
    assert (second['kind'], second['told']) == ('ZeroDivisionError', None)


def test_a_rank_that_leaves_with_an_error_of_its_own_is_quoted(outcome):
    for rank in outcome('one_leaves_with_an_error')[::2]:
        assert dict(kind='RankFailed', message='rank 1 failed: image 3 is gone').items() <= rank.items()


def test_a_signal_is_heard_while_a_rank_waits(outcome):
    first, second, third = outcome('a_signal_ends_the_wait')
    assert (first['result'], second['result'], third['result']) == ('enough', 'late', 'enough')


def test_a_rank_with_nothing_to_add_leaves_after_the_first_one(outcome):
    first, *others = outcome('linger_for_the_first')
    assert all(rank['ended'] >= first['ended'] for rank in others)
