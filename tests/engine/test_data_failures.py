"""Data that cannot be had, on one rank: one clear error on all of them, and the run can be resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlmtune.data import SupervisedDataset
from vlmtune.utils.errors import DataError, TrainingError

IN_ORDER = dict(pack_to_max_length=False, shuffle=False, max_epochs=1, save_steps=1)
BAD = 5  # of one process: the second micro-batch of iteration 3


@pytest.fixture
def bad_sample():
    """``with bad_sample(harm)``: when sample 5 is loaded, ``harm`` is called with its tensors."""
    load = SupervisedDataset.__getitem__

    @contextmanager
    def within(harm):
        def getitem(self, key):
            tensors = load(self, key)
            if key.sample == BAD:
                harm(tensors)
            return tensors

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SupervisedDataset, '__getitem__', getitem)
            yield

    return within


def saved(work_dir):
    return sorted(path.name for path in work_dir.glob('iter_*'))


# ---- one process


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_of_the_machine_is_one_line(workers, run, bad_sample, tmp_path):
    """Neither torch's wrapping nor the worker's traceback."""

    def fail(tensors):
        raise OSError(5, 'Input/output error', '/data/x.png')

    with bad_sample(fail), pytest.raises(TrainingError) as caught:
        run('a', dataloader_num_workers=workers, **IN_ORDER)
    assert str(caught.value) == (
        "rank 0 could not get its data at iteration 3: OSError: [Errno 5] Input/output error: '/data/x.png', "
        'loading sample 5 (data.json[5])'
    )
    assert saved(tmp_path / 'a') == ['iter_1.pth', 'iter_2.pth']


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_of_the_data_stays_one(workers, run, tiny_data, tmp_path):
    """The images vanish after they were planned."""
    data = tiny_data('llava', rows=17)
    images = tmp_path / 'images'
    shutil.copytree(data.image_folder, images)
    load = SupervisedDataset.__getitem__

    def getitem(self, key):
        if key.sample >= 3:
            shutil.rmtree(images, ignore_errors=True)
        return load(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedDataset, '__getitem__', getitem)
        with pytest.raises(DataError) as caught:
            run('a', recipe=dict(images=images), dataloader_num_workers=workers, **IN_ORDER)
    message = str(caught.value)
    assert re.match(r'rank 0 could not get its data at iteration \d: sample \d+ \(data.json\[\d+\]\): image ', message)
    assert str(images) in message
    assert '\n' not in message


def test_a_worker_that_is_killed(run, bad_sample, tmp_path):
    with bad_sample(lambda _: os.kill(os.getpid(), signal.SIGKILL)), pytest.raises(TrainingError) as caught:
        run('a', dataloader_num_workers=2, **IN_ORDER)
    assert re.fullmatch(
        r'rank 0 could not get its data at iteration \d: a data worker \(pid \d+\) was ended by the signal "Killed", '
        r'as the system does when memory is short, loading sample 5 \(data.json\[5\]\)',
        str(caught.value),
    )
    run('a', resume=True, **IN_ORDER)
    assert 'iter_9.pth' in saved(tmp_path / 'a')


def test_a_worker_that_hangs(run, bad_sample):
    """Of the samples of the pack that was waited for, the one that it was at."""
    hang = {'dataloader_num_workers': 2, 'train_dataloader.timeout': 5, 'batch_size': 2, 'accumulative_counts': 1}
    with bad_sample(lambda _: time.sleep(1000)), pytest.raises(TrainingError) as caught:
        run('a', **hang, **IN_ORDER)
    assert str(caught.value) == (
        'rank 0 could not get its data at iteration 3: the data workers gave nothing for 5 s '
        '(train_dataloader.timeout), loading sample 5 (data.json[5])'
    )


# ---- two ranks


TWO_RANKS = ('vanished', 'killed_worker', 'hung_worker', 'disk_trouble', 'nan', 'nan_skipped', 'killed_rank', 'uneven')


@pytest.fixture(scope='module')
def two_ranks(write_recipe, tiny_data, tmp_path_factory):
    """``two_ranks('nan')``: what each rank told, and the work dir; one process runs all cases."""
    folder = tmp_path_factory.mktemp('two_ranks')
    recipe = write_recipe(folder / 'recipe.py', name='two_ranks')
    script, images = Path(__file__).with_name('failing_ranks.py'), tiny_data('llava', rows=17).image_folder
    log = folder / 'log.txt'
    with log.open('w') as file:
        subprocess.run(
            [sys.executable, script, recipe, images, folder, *TWO_RANKS],
            stdout=file,
            stderr=file,
            timeout=500,
            check=True,
        )

    def told(case):
        files = [folder / f'{case}.{rank}.json' for rank in range(2)]
        print(log.read_text()[-5000:])
        return [json.loads(file.read_text()) if file.exists() else None for file in files], folder / case

    return told


CANNOT = r'rank 1 could not get its data at iteration'


@pytest.mark.parametrize(
    ('case', 'kind', 'message'),
    [
        (
            'vanished',
            'DataError',
            CANNOT + r' 3: sample 11 \(data.json\[11\]\): image not found: .*; fix the row, or .*',
        ),
        (
            'killed_worker',
            'TrainingError',
            CANNOT + r' \d: a data worker \(pid \d+\) was ended by the signal "Killed", as the system does when memory '
            r'is short, loading sample 11 \(data.json\[11\]\)',
        ),
        (
            'hung_worker',
            'TrainingError',
            CANNOT + r' 3: the data workers gave nothing for 5 s \(train_dataloader.timeout\), '
            r'loading sample 11 \(data.json\[11\]\)',
        ),
        (
            'disk_trouble',
            'TrainingError',
            CANNOT + r" 3: OSError: \[Errno 5\] Input/output error: '/data/images', "
            r'loading sample 11 \(data.json\[11\]\)',
        ),
        (
            'nan',
            'TrainingError',
            r'the loss is nan at iteration 3 \(rank 1, micro-batch 1: sample 11 \(data.json\[11\]\)\); no weight .*',
        ),
    ],
)
def test_all_ranks_end_with_one_message(case, kind, message, two_ranks):
    told, work_dir = two_ranks(case)
    assert [rank[:2] for rank in told] == [[kind, told[0][1]]] * 2
    assert re.fullmatch(message, told[0][1])
    if case != 'killed_worker':  # which is found when somebody waits
        assert saved(work_dir) == ['iter_1.pth', 'iter_2.pth']


def test_only_the_first_rank_has_to_say_it(two_ranks):
    assert all(rank[2] for case in ('vanished', 'hung_worker', 'nan') for rank in two_ranks(case)[0])


def test_a_bad_step_of_one_rank_is_skipped_by_all(two_ranks):
    told, work_dir = two_ranks('nan_skipped')
    assert [rank[1] for rank in told] == ['', '']
    (line,) = (json.loads(line) for line in (work_dir / 'non_finite.jsonl').read_text().splitlines())
    assert (line['iteration'], line['rank'], line['micro_batch']) == (3, 1, 1)
    assert line['samples'] == [[11, 'data.json[11]']]
    assert not (work_dir / 'iter_3.pth').exists()  # saving waits for a step that goes well
    before, after = ((work_dir / f'iter_{n}.pth' / 'model.safetensors').read_bytes() for n in (2, 5))
    assert before != after


def test_a_rank_that_dies_in_the_middle_of_a_step_is_named(two_ranks):
    (survivor, dead), _ = two_ranks('killed_rank')
    assert dead is None
    assert survivor[0] == 'RankMissing'
    assert re.fullmatch(
        r'rank 1 has died \(last heard \d+ s ago: learning iteration 3\); seen by rank 0 while learning iteration 3',
        survivor[1],
    )


def test_packs_that_do_not_come_out_even(two_ranks):
    """17 samples, 2 ranks, 3 micro-batches each: the third step has 5 samples and a filler."""
    told, work_dir = two_ranks('uneven')
    assert [rank[1] for rank in told] == ['', '']
    assert saved(work_dir) == ['iter_3.pth']
    messages = json.loads((work_dir / 'iter_3.pth' / 'trainer.json').read_text())['messages']
    assert messages['train/samples']['values'] == [6, 6, 5]
