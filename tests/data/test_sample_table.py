"""What is written into a table comes out of it again, sample by sample, from a file that is mapped into memory."""

import pickle

import numpy as np
import pytest

from vlmtune.data.sample_table import BAD, OK, OVERLONG, FileState, PlannedRow, SampleTable, to_batch, write_batches
from vlmtune.structures import IGNORE_INDEX, ImageRef, ImageSize, Sample
from vlmtune.utils.errors import ConfigError

IMAGE = 9
N = IGNORE_INDEX
BYTES = (ImageRef(data=b'x'), ImageRef(path='b.png'))


def sample(ids, learned, **more):
    ids = np.array(ids, np.int32)
    return Sample(ids, np.where(np.array(learned, bool), ids, N).astype(np.int32), **more)


PATHS = (ImageRef(path='a.png'), ImageRef(path='dir/é.png'))
TWO, ONE = (ImageSize(3, 4), ImageSize(5, 6)), (ImageSize(7, 8),)
SAMPLES = [
    sample([1, 9, 9, 9, 2, 9, 9, 3], [0, 0, 0, 0, 0, 0, 0, 1], images=PATHS, image_sizes=TWO, patches=20),
    sample([9, 9], [0, 0], images=PATHS[:1], image_sizes=ONE, patches=8),
    sample([4, 5, 6, 7, 8], [1, 1, 0, 1, 1]),
    sample([], []),
    sample([1, 9, 2], [1, 0, 1], images=BYTES, image_sizes=TWO, patches=2),
]
BAD_ROW = PlannedRow(
    5,
    BAD,
    images=PATHS,
    files=(FileState(-1, -1), FileState(7, 8)),
    where='a.jsonl:6',
    error='missing_image',
    reason='gone',
)


def files(images):
    return tuple(FileState(-1, -1) if image.path is None else FileState(len(image.path), 2**60) for image in images)


def images_of(row):
    assert row == 4
    return BYTES


@pytest.fixture
def table(tmp_path):
    rows = [PlannedRow(i, OK, s, i == 1, s.images, files(s.images)) for i, s in enumerate(SAMPLES)]
    rows += [BAD_ROW, PlannedRow(6, OVERLONG, where='a.jsonl:7', error='unfit_sample', reason='has 9 tokens')]
    # Of row 1 an image was left out with its turn; its file was looked at.
    rows[1] = PlannedRow(1, OK, SAMPLES[1], True, PATHS, files(PATHS))
    path = tmp_path / 'a.arrow'
    batches = [to_batch(part, image_token=IMAGE) for part in (rows[:2], rows[2:3], rows[3:])]
    write_batches(path, batches, image_token=IMAGE)
    return SampleTable(path, images_of=images_of)


def same(left, right):
    assert left.input_ids.tolist() == right.input_ids.tolist()
    assert left.labels.tolist() == right.labels.tolist()
    assert left.input_ids.dtype == left.labels.dtype == np.int32
    assert (left.images, left.image_sizes, left.patches) == (right.images, right.image_sizes, right.patches)


def test_samples_come_back(table):
    assert (len(table), table.row_count, table.rows.tolist()) == (5, 7, [0, 1, 2, 3, 4])
    for left, right in zip(table, SAMPLES, strict=True):
        same(left, right)
    same(table[-1], SAMPLES[-1])
    same(table[1:3][1], SAMPLES[2])
    with pytest.raises(IndexError):
        table[5]


def test_another_process_opens_the_file_itself(table):
    copied = pickle.dumps(table)
    assert len(copied) < 1000
    same(pickle.loads(copied)[4], SAMPLES[4])


def test_numbers(table):
    assert table.numbers('length').tolist() == [8, 2, 5, 0, 3]
    assert table.numbers('supervised').tolist() == [1, 0, 3, 0, 1]  # nothing predicts the first position
    assert table.numbers('patches').tolist() == [20, 8, 0, 0, 2]
    assert table.numbers('truncated').tolist() == [0, 1, 0, 0, 0]
    assert table.numbers('length').dtype == np.int64


def test_problems(table):
    (bad,), (long,) = table.problems(BAD), table.problems(OVERLONG)
    assert (bad.index, bad.kind, bad.error, bad.where, bad.reason) == (5, 'bad', 'missing_image', 'a.jsonl:6', 'gone')
    assert bad.images == ('a.png', 'dir/é.png')
    assert (long.index, long.kind, long.images) == (6, 'overlong', ())


def test_every_image_file_in_every_state_it_was_seen_in(table):
    found = [entry for part in table.image_files() for entry in part]
    assert sorted(set(found)) == sorted(
        {('a.png', FileState(5, 2**60)), ('a.png', FileState(-1, -1)), ('b.png', FileState(5, 2**60)),
         ('dir/é.png', FileState(9, 2**60)), ('dir/é.png', FileState(7, 8))}
    )  # fmt: skip


def test_tokens_are_stored_folded(tmp_path):
    """4 bytes for each token that is not an image's: an image of a million tokens takes no room."""
    long = sample([1] + [IMAGE] * 1_000_000 + [2], [0] * 1_000_001 + [1])
    path = tmp_path / 'a.arrow'
    write_batches(path, [to_batch([PlannedRow(0, OK, long)], image_token=IMAGE)], image_token=IMAGE)
    assert path.stat().st_size < 10_000
    same(SampleTable(path, images_of=images_of)[0], long)


def test_text_models_have_no_image_token(tmp_path):
    path = tmp_path / 'a.arrow'
    text = sample([9, 9, 1], [0, 1, 1])
    write_batches(path, [to_batch([PlannedRow(0, OK, text)], image_token=None)], image_token=None)
    same(SampleTable(path, images_of=images_of)[0], text)


def test_a_temporary_table_leaves_no_file_however_its_process_ends(table, tmp_path):
    """Ranks of a run end with ``os._exit``, and a run may be killed: no finalizer runs then."""
    path = tmp_path / 'a.arrow'
    once = SampleTable(path, images_of=images_of, temporary=True)
    assert not path.exists()
    same(once[4], SAMPLES[4])
    copied = pickle.loads(pickle.dumps(once))
    del once
    same(copied[4], SAMPLES[4])


def test_what_the_caller_raises_is_no_matter_of_the_file(tmp_path):
    def batches():
        yield to_batch([], image_token=IMAGE)
        raise OSError('too many open files')

    with pytest.raises(OSError, match='too many'):
        write_batches(tmp_path / 'a.arrow', batches(), image_token=IMAGE)
    with pytest.raises(ConfigError, match=r'cannot be written to .*No such file.*plan_cache_dir'):
        write_batches(tmp_path / 'none' / 'a.arrow', [], image_token=IMAGE)
