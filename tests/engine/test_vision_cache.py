"""Training from stored features learns what training from pixels learns, and never from stale ones."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.data import (
    MixedDataset,
    Processor,
    SupervisedDataset,
    build_train_loader,
    chat_template_map_fn,
    llava_map_fn,
    load_rows,
)
from vlmtune.engine.vision_cache import use_vision_cache
from vlmtune.models import SupervisedFinetune
from vlmtune.models.vision_features import encode_images
from vlmtune.ops import finish_images
from vlmtune.utils.errors import ConfigError, DataError

FROZEN = dict(vision_encoder='frozen', projector='full', llm='frozen')
TEMPLATE = {'llava': 'vicuna', 'internvl': None}


@pytest.fixture
def make(tiny_model, tiny_data, tmp_path):
    """``make('llava')``: a model, a data set on a copy of the images, and the folder of those."""
    data = tiny_data('llava', rows=9)
    folder = tmp_path / 'images'
    folder.mkdir()
    for path in Path(data.image_folder).rglob('*.*'):
        (folder / path.name).write_bytes(path.read_bytes())

    def build(name, *, tune=None, dtype='float32', rows=None, **settings):
        source = str(tiny_model(name))
        dataset = SupervisedDataset(
            load_rows(data.data_path) if rows is None else rows,
            processor=Processor(source, prompt_template=TEMPLATE[name], **settings.pop('processor', {})),
            dataset_map_fn=llava_map_fn,
            template_map_fn=chat_template_map_fn,
            image_folder=str(folder),
            max_length=128,
            **settings,
        )
        torch.manual_seed(0)
        return SupervisedFinetune(source, tune=tune or FROZEN, dtype=dtype), dataset, folder

    return build


def three_losses(model, dataset, **loader):
    """Of three steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in list(build_train_loader(dataset, seed=3, **(loader or {'pack_to_max_length': True})))[:3]:
        loss = model(**batch) / int((batch['labels'] != -100).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 3
    return losses


@pytest.mark.parametrize(('name', 'dtype'), [('llava', 'float32'), ('llava', 'bfloat16'), ('internvl', 'float32')])
def test_losses_are_those_of_pixels_to_the_bit(make, tmp_path, monkeypatch, name, dtype):
    """Where as many images are encoded together in the cache as in a step: here one."""
    monkeypatch.setattr('vlmtune.engine.vision_cache._BATCH', 1)
    model, dataset, _ = make(name, dtype=dtype)
    single = [i for i in range(len(dataset)) if len(dataset[i].get('pixel_bytes', ())) == 1]
    monkeypatch.setattr(dataset, 'epoch_samples', lambda *, seed, epoch: np.array(single * 2))
    pixels = three_losses(model, dataset, batch_size=1)
    model, _, _ = make(name, dtype=dtype)
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    assert {'pixel_bytes', 'image_features'} & set(dataset[single[0]]) == {'image_features'}
    assert three_losses(model, dataset, batch_size=1) == pixels


@pytest.mark.parametrize(('name', 'dtype', 'tolerance'), [('llava', 'float32', 1e-6), ('llava', 'bfloat16', 5e-5)])
def test_losses_of_packs_are_those_of_pixels(make, tmp_path, name, dtype, tolerance):
    """Matrix products of more or fewer images add up in another order; bfloat16 shows it earlier."""
    pixels = three_losses(*make(name, dtype=dtype)[:2])
    model, dataset, _ = make(name, dtype=dtype)
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    assert three_losses(model, dataset) == pytest.approx(pixels, rel=tolerance, abs=0)


def test_the_images_are_not_decoded_again_and_names_stay(make, tmp_path):
    model, dataset, folder = make('llava')
    names, drawn = list(model.state_dict()), torch.get_rng_state()
    use_vision_cache(model, dataset, folder=tmp_path / 'cache', workers=1)
    assert torch.get_rng_state().equal(drawn)  # or dropout would be another one
    for path in folder.iterdir():
        path.write_bytes(b'')
    assert three_losses(model, dataset)
    assert list(model.state_dict()) == names


def test_a_model_with_a_cache_still_takes_pixels(make, tmp_path):
    model, dataset, _ = make('llava')
    batch = next(iter(build_train_loader(dataset, seed=0, batch_size=9)))
    before = model(**batch).item()
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    assert model(**batch).item() == before


def stores(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_what_the_features_depend_on_makes_a_new_store(make, tmp_path, caplog):
    cache = tmp_path / 'cache'
    seen = set()

    def built(model, dataset):
        before = set(seen)
        use_vision_cache(model, dataset, folder=cache)
        seen.update(stores(cache))
        return len(seen) - len(before)

    model, dataset, folder = make('llava')
    assert built(model, dataset) == 1
    with caplog.at_level(logging.INFO):
        assert built(*make('llava')[:2]) == 0
    assert 'from' in caplog.text
    with torch.no_grad():
        model.model.get_submodule('model.multi_modal_projector').linear_1.weight.add_(1)
    assert built(model, dataset) == 0  # the projector reads the features
    with torch.no_grad():
        next(model.model.get_submodule('model.vision_tower').parameters()).add_(1e-3)
    assert built(model, dataset) == 1
    assert built(*make('llava', dtype='bfloat16')[:2]) == 1
    assert built(*make('llava', processor={'image_processor': {'image_mean': [0.5, 0.5, 0.5]}})[:2]) == 1
    image = sorted(folder.iterdir())[0]
    os.utime(image, (1, 1))
    assert built(*make('llava')[:2]) == 1


def test_a_store_that_was_cut_short_is_built_again(make, tmp_path):
    model, dataset, _ = make('llava')
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    (store,) = (path for path in (tmp_path / 'cache').iterdir() if path.is_dir())
    whole = (store / 'features.bin').read_bytes()
    (store / 'features.bin').write_bytes(whole[:-8])
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    assert (store / 'features.bin').read_bytes() == whole


def test_the_features_are_what_enters_the_projector(make, tmp_path):
    model, dataset, _ = make('llava')
    index = next(i for i in range(len(dataset)) if dataset.samples[i].images)
    pixels = finish_images({name: dataset[index][name] for name in ('pixel_bytes', 'pixel_affine')})
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    expected = encode_images(model.model, pixels, family=model.family)
    torch.testing.assert_close(dataset[index]['image_features'], expected, rtol=0, atol=1e-5)  # other batch sizes


def test_members_of_a_mixture_share_a_store(make, tmp_path):
    model, first, _ = make('llava')
    _, second, _ = make('llava')
    mixed = MixedDataset(datasets=[first, second], processor=first.processor, repeats=[1, 2])
    use_vision_cache(model, mixed, folder=tmp_path / 'cache')
    assert len(stores(tmp_path / 'cache')) == 1
    assert all('pixel_bytes' not in mixed[index] for index in range(len(mixed)))


def broken_rows(folder):
    picture = Image.effect_noise((64, 48), 80).convert('RGB')
    picture.save(folder / 'good.png')
    picture.save(folder / 'bad.png')
    whole = (folder / 'bad.png').read_bytes()
    (folder / 'bad.png').write_bytes(whole[: len(whole) // 2])
    talk = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'Noise.'}]
    return [{'image': name, 'conversations': talk} for name in ('good.png', 'bad.png')]


def test_a_broken_image_takes_part_blank_and_unlearned(make, tmp_path):
    rows = broken_rows(tmp_path / 'images')
    model, dataset, _ = make('llava', rows=rows, on_bad_sample='skip')
    use_vision_cache(model, dataset, folder=tmp_path / 'cache')
    good, bad = dataset[0], dataset[1]
    assert (good['labels'] != -100).any()
    assert not (bad['labels'] != -100).any()
    assert bad['image_features'].shape == good['image_features'].shape
    model, dataset, _ = make('llava', rows=rows)
    with pytest.raises(DataError, match='image cannot be read'):
        use_vision_cache(model, dataset, folder=tmp_path / 'other')
    assert stores(tmp_path / 'other') == set()


def test_encoders_that_train_and_other_families_are_refused(make, tmp_path, tiny_model):
    model, dataset, _ = make('llava', tune=dict(vision_encoder='lora', projector='full'))
    with pytest.raises(ConfigError, match="the vision encoder trains .*vision_encoder='frozen'"):
        use_vision_cache(model, dataset, folder=tmp_path)
    other = SupervisedFinetune(str(tiny_model('smolvlm')), tune=FROZEN, dtype='float32')
    with pytest.raises(ConfigError, match='not for smolvlm; supported are llava, internvl'):
        use_vision_cache(other, dataset, folder=tmp_path)


def test_a_disk_that_is_too_small_is_told_before_it_is_full(make, tmp_path, monkeypatch):
    model, dataset, _ = make('llava')
    usage = type('usage', (), {'free': 10})
    monkeypatch.setattr('vlmtune.engine.vision_cache.shutil.disk_usage', lambda path: usage)
    with pytest.raises(ConfigError, match='vision_cache: needs .* where 0.00 GiB are free; name another folder'):
        use_vision_cache(model, dataset, folder=tmp_path / 'cache')


def test_a_run_with_the_setting_learns_the_same(run, losses, tmp_path):
    """Through the config: dropout draws the same numbers, and sample answers still see pixels."""
    Image.effect_noise((40, 30), 80).convert('RGB').save(tmp_path / 'question.png')
    recipe = dict(
        tune=dict(projector='full', llm='lora'), questions=['What?'], pictures=[str(tmp_path / 'question.png')]
    )
    settings = dict(recipe=recipe, max_epochs=None, max_steps=3, evaluation_freq=2)
    plain = run('plain', **settings)
    cached = run('cached', **settings, vision_cache=str(tmp_path / 'cache'))
    assert len(stores(tmp_path / 'cache')) == 1
    assert losses(cached / 'iter_3.pth') == pytest.approx(losses(plain / 'iter_3.pth'), rel=1e-6, abs=0)
