"""Training on a stream: it ends by max_steps, and an interrupted run ends with the bits of one that was not."""

import shutil

import pytest

from vlmtune.apps.train import train
from vlmtune.utils.errors import ConfigError

CHANGES = (
    ('SupervisedDataset, rows=dict(type=load_rows,', 'StreamingDataset, shuffle_window=6, rows=dict(type=stream_rows,'),
    ('dataset_map_fn=dict(type=llava_map_fn)', 'dataset_map_fn=dict(type=openai_map_fn)'),
    ('import Processor, SupervisedDataset,', 'import Processor, StreamingDataset, openai_map_fn, stream_rows,'),
)


@pytest.fixture
def run_stream(write_recipe, tiny_data, tmp_path):
    """``run_stream('a')``: the recipe over 17 rows of a .jsonl file, read as a stream in windows of six."""

    def go(name, *, resume=False, **settings):
        data = tiny_data('openai', rows=17)
        path = write_recipe(tmp_path / 'recipe.py', data=data.data_path, images=data.image_folder)
        text = path.read_text()
        for old, new in CHANGES:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text)
        settings = {'max_epochs': None, 'max_steps': 12, 'save_steps': 1, **settings}
        train(str(path), work_dir=str(tmp_path / name), resume=resume, overrides=settings)
        return tmp_path / name

    return go


def test_resume_is_exact(run_stream, contents, differences):
    """12 steps of two packs read the file more than once; interrupted in a later pass, with workers that are ahead."""
    whole = run_stream('whole', dataloader_num_workers=2)
    expected = contents(whole / 'iter_12.pth')
    assert expected['trainer']['sampler']['passes'] >= 1
    for checkpoint in whole.glob('iter_*.pth'):
        if int(checkpoint.stem.removeprefix('iter_')) > 9:
            shutil.rmtree(checkpoint)
    run_stream('whole', resume=True, dataloader_num_workers=2)
    assert differences(contents(whole / 'iter_12.pth'), expected) == []


def test_rows_that_were_noted_before_a_resume_stay_noted(run_stream, tmp_path):
    noted = tmp_path / 'kept' / 'bad_samples.jsonl'
    noted.parent.mkdir()
    noted.write_text('of an earlier start\n')
    run_stream('kept', max_steps=1)
    assert 'of an earlier start' not in noted.read_text()
    noted.write_text('of this run\n')
    run_stream('kept', max_steps=2, resume=True)
    assert noted.read_text().startswith('of this run\n')


def test_epochs_are_refused(run_stream):
    with pytest.raises(ConfigError, match='a stream has no epochs; set max_steps'):
        run_stream('epochs', max_epochs=1, max_steps=None)
