"""A save that fails leaves the checkpoint before it, and one clear error."""

import pytest

from vlmtune.testing.faults import ERRORS, SAVING

SAID = dict(ENOSPC='No space left on device', EIO='Input/output error', exception='made up by a test')


@pytest.fixture(scope='session')
def fail(go, check_end):
    """``fail((at, fault), folder, ranks)``: let a point of a run fail; then resume."""

    def one(point, folder, ranks):
        (at, fault), work_dir = point, folder / 'run'
        failed = go(1, work_dir, faults=dict(journal=str(folder), at=at, fault=fault), ranks=ranks)
        assert failed.codes == [1], failed
        assert SAID[fault] in failed.said[0].strip().splitlines()[-1], failed
        assert not list(work_dir.glob('*.tmp'))
        resumed = go(1, work_dir, resume=True, ranks=ranks)
        assert resumed.codes == [0], resumed
        check_end(work_dir, 1)

    return one


def points_of_saves(whole, points) -> list[list[int]]:
    """The points inside each save."""
    saves: list[list[int]] = [[]]
    for at, kind in enumerate(points(whole(1), 0)):
        if kind in SAVING:
            saves[-1].append(at)
        elif saves[-1]:
            saves.append([])
    return [save for save in saves if save]


def test_some_points_of_a_save(warm_ranks, fail, whole, points, tmp_path):
    """The first one, one in the middle and the last ones of the second save, each with another error."""
    _, save, _ = points_of_saves(whole, points)
    for number, at in enumerate([save[0], save[len(save) // 2], *save[-4:]]):
        fail((at, ERRORS[number % 3]), tmp_path / str(number), warm_ranks)


@pytest.mark.chaos
@pytest.mark.parametrize('fault', ERRORS)
def test_every_point_of_a_save(fault, spread, fail, whole, points, capsys):
    _, save, _ = points_of_saves(whole, points)
    failures = spread(fail, [(at, fault) for at in save])
    with capsys.disabled():
        print(f'\n{fault} at each of the {len(save)} writes, flushes and renames of a save: {len(failures)} failures')
    assert failures == []


def test_both_ranks_say_that_one_could_not_save(go, whole, points, tmp_path):
    at = next(at for at, kind in enumerate(points(whole(2), 1)) if kind == 'write')
    faults = dict(journal=str(tmp_path), on_rank=1, at=at, fault='ENOSPC')
    failed = go(2, tmp_path / 'run', faults=faults)
    assert failed.codes == [1, 1]
    for rank, said in enumerate(failed.said):
        last = said.strip().splitlines()[-1]
        assert 'No space left on device' in last
        assert ('rank 1 failed' in last) == (rank == 0)
    assert not list((tmp_path / 'run').glob('iter_*'))
