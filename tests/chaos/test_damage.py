"""A checkpoint in which any file is cut, changed or gone is passed over, by name, and never half used."""

import json
import shutil

import pytest

KINDS = ('cut', 'flip', 'delete')


def damage(path, kind):
    """Break one file."""
    content = path.read_bytes()
    if kind == 'delete':
        path.unlink()
    elif kind == 'cut':
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def files_of(checkpoint):
    return sorted(json.loads((checkpoint / 'manifest.json').read_text())['files']) + ['manifest.json']


@pytest.fixture(scope='session')
def resume_damaged(go, half, check_end):
    """``resume_damaged((name, kind), folder, ranks)``: go on where the newest checkpoint has a broken file."""

    def one(what, folder, ranks):
        work_dir = half(folder / 'run')
        newest = work_dir / 'iter_4.pth'
        damage(newest / what[0], what[1])
        refused = go(1, folder / 'explicit', resume=str(newest), ranks=ranks)
        assert refused.codes == [1], refused
        assert 'CheckpointError' in refused.said[0].strip().splitlines()[-1], refused
        resumed = go(1, work_dir, resume=True, ranks=ranks)
        assert resumed.codes == [0], resumed
        assert 'passed over' in resumed.said[0]
        assert 'iter_2.pth at iteration 2 of 6' in resumed.said[0]
        if what[0] == 'manifest.json':  # without it nobody knows whose it was, so it is kept
            shutil.rmtree(work_dir / 'iter_4.pth.old')
        check_end(work_dir, 1)

    return one


@pytest.mark.parametrize(
    ('name', 'kind'),
    [('model.safetensors', 'flip'), ('optimizer_0.safetensors', 'cut'), ('trainer.json', 'delete')],
)
def test_some_damage(name, kind, warm_ranks, resume_damaged, tmp_path):
    resume_damaged((name, kind), tmp_path, warm_ranks)


@pytest.mark.chaos
@pytest.mark.parametrize('kind', KINDS)
def test_every_file(kind, spread, half, resume_damaged, tmp_path, capsys):
    names = files_of(half(tmp_path / 'run') / 'iter_4.pth')
    failures = spread(resume_damaged, [(name, kind) for name in names])
    with capsys.disabled():
        print(f'\n{kind}: each of the {len(names)} files of a checkpoint: {len(failures)} failures')
    assert failures == []


@pytest.mark.parametrize('everything', ['flip', 'delete'])
def test_no_good_checkpoint_is_left(everything, go, half, check_end, tmp_path):
    """Then a run starts anew, and says what it passed over."""
    work_dir = half(tmp_path / 'run')
    for checkpoint in work_dir.glob('iter_*.pth'):
        damage(checkpoint / 'model.safetensors', everything)
    resumed = go(1, work_dir, resume=True)
    assert resumed.codes == [0], resumed
    assert 'iter_4.pth' in resumed.said[0]
    assert 'starting fresh' in resumed.said[0]
    check_end(work_dir, 1)
