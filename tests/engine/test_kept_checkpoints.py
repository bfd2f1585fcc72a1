"""The newest checkpoint that holds is found, and only older ones are removed."""

from functools import partial

import pytest

from tests.engine.sealed import names, seal
from vlmtune.engine import checkpoint


@pytest.fixture
def write(tmp_path):
    """``write(3)``: iter_3.pth, sealed; ``at`` is when."""
    return partial(seal, tmp_path)


# ---- the newest one that holds


def test_the_newest_is_the_one_saved_last_not_the_highest_number(write, tmp_path):
    """A new run in an old work dir counts from 1 again."""
    write(900, at=1.0)
    newest = write(2, at=2.0)
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(newest, ())


def test_broken_ones_are_passed_over_and_it_says_why(write, damage, tmp_path):
    good = write(1, at=1.0)
    damage(write(2, at=2.0), 'changed')
    damage(write(3), 'no manifest')
    (tmp_path / 'iter_4.pth').write_bytes(b'pickle')
    write(5, at=0.5)
    found = checkpoint.find_latest(tmp_path)
    assert found.path == good
    assert len(found.skipped) == 3
    text = '\n'.join(found.skipped)
    assert 'iter_2.pth: model.safetensors was changed' in text
    assert 'iter_3.pth has no manifest.json' in text
    assert 'iter_4.pth is a file' in text


def test_the_newest_is_the_one_saved_last_though_the_clock_was_put_back(write, tmp_path):
    write(1, at=2e10)  # some centuries ahead
    newest = write(2)
    assert checkpoint.find_latest(tmp_path).path == newest


def test_without_hashes_a_changed_byte_is_not_seen(write, damage, tmp_path):
    damage(write(1), 'changed')
    assert checkpoint.find_latest(tmp_path).path is None
    assert checkpoint.find_latest(tmp_path, hashes=False).path == tmp_path / 'iter_1.pth'


def test_nothing_there(tmp_path):
    assert checkpoint.find_latest(tmp_path / 'nowhere') == checkpoint.Found(None, ())
    (tmp_path / 'iter_x.pth').mkdir()
    (tmp_path / 'iter_1.pth.tmp').mkdir()
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(None, ())


def test_the_pointer_is_relative_so_that_a_work_dir_can_move(write, tmp_path):
    checkpoint.point_to(write(1))
    checkpoint.point_to(write(2))
    assert (tmp_path / 'last_checkpoint').read_text() == 'iter_2.pth\n'
    assert names(tmp_path.iterdir()) == ['iter_1.pth', 'iter_2.pth', 'last_checkpoint']


@pytest.mark.parametrize('text', ['../../home\n', '/', 'x' * 10**6, '\udcff', ''])
def test_a_pointer_that_was_tampered_with_leads_nowhere(text, write, tmp_path):
    for iteration in (1, 2):
        write(iteration, at=float(iteration))
    (tmp_path / 'last_checkpoint').write_text(text, errors='surrogateescape')
    assert names(checkpoint.purge(tmp_path, keep=1)) == ['iter_1.pth']


# ---- purging


@pytest.mark.parametrize(('keep', 'left'), [(-1, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4]), (0, [4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(keep, left, write, tmp_path):
    for iteration in (1, 2, 3, 4):
        write(iteration, at=float(iteration))
    removed = checkpoint.purge(tmp_path, keep=keep)
    assert names(tmp_path.iterdir()) == [f'iter_{i}.pth' for i in left]
    assert names(removed) == [f'iter_{i}.pth' for i in (1, 2, 3, 4) if i not in left]


def test_broken_ones_do_not_count_as_kept(write, damage, tmp_path):
    """One good checkpoint always stays."""
    write(1, at=1.0)
    damage(write(2, at=2.0), 'truncated')
    damage(write(3, at=3.0), 'missing')
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['iter_1.pth']


def test_the_one_just_saved_stays_though_the_clock_went_back(write, tmp_path):
    write(1, at=100.0)
    checkpoint.point_to(write(2, at=50.0))
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.glob('iter_*')) == ['iter_1.pth', 'iter_2.pth']


def test_what_others_wrote_is_left_alone(write, tmp_path):
    (tmp_path / 'iter_1.pth').write_bytes(b'pickle')
    (tmp_path / 'iter_2.pth').mkdir()
    (tmp_path / 'best.pth').mkdir()
    for iteration in (3, 4):
        write(iteration, at=float(iteration))
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['best.pth', 'iter_1.pth', 'iter_2.pth', 'iter_4.pth']


def test_what_a_killed_run_left_half_written_goes(write, tmp_path):
    checkpoint.start(tmp_path / 'iter_7.pth')
    write(8)
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['iter_8.pth']
