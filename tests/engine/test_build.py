"""A data set is given what it takes: a place for its plan, and one for the list of what it could not use."""

from vlmtune.apps.train import prepare_config
from vlmtune.data import SupervisedDataset
from vlmtune.engine.build import build_data


class OwnDataset(SupervisedDataset):
    """A user's, with fewer arguments."""

    def __init__(self, *, processor, rows, dataset_map_fn, template_map_fn, image_folder, max_length):
        super().__init__(
            rows,
            processor=processor,
            dataset_map_fn=dataset_map_fn,
            template_map_fn=template_map_fn,
            image_folder=image_folder,
            max_length=max_length,
        )


def test_the_plan_and_the_bad_samples_have_their_places(write_recipe, tmp_path):
    overrides = dict(plan_cache_dir=str(tmp_path / 'plans'))
    cfg = prepare_config(str(write_recipe(tmp_path / 'recipe.py')), work_dir=str(tmp_path / 'run'), overrides=overrides)
    build_data(cfg)
    assert len(list((tmp_path / 'plans').glob('*.arrow'))) == 1
    assert not (tmp_path / 'run').exists()
    build_data(cfg, bad_samples_file=tmp_path / 'run' / 'bad_samples.jsonl')
    assert (tmp_path / 'run' / 'bad_samples.jsonl').read_text() == ''
    assert len(list((tmp_path / 'plans').glob('*.arrow'))) == 1


def test_a_data_set_that_takes_neither_gets_neither(write_recipe, tmp_path):
    cfg = prepare_config(str(write_recipe(tmp_path / 'recipe.py')), work_dir=str(tmp_path / 'run'))
    cfg.train_dataloader.dataset.type = OwnDataset
    _, loader = build_data(cfg, bad_samples_file=tmp_path / 'bad_samples.jsonl')
    assert len(loader.dataset) == 17
    assert not (tmp_path / 'bad_samples.jsonl').exists()
