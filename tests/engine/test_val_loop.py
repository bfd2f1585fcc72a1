"""Validation while training: its loss is the model's own, training does not notice, and what was killed goes on."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError, DataError

SHORT = dict(max_steps=4, max_epochs=None)
TRACKER = """from mmengine.visualization import LocalVisBackend, Visualizer
visualizer = dict(type=Visualizer, vis_backends=[dict(type=LocalVisBackend)])
"""


def records(work_dir):
    return [json.loads(line) for line in (work_dir / 'validation.jsonl').read_text().splitlines()]


def predictions(work_dir, step):
    path = work_dir / 'validation' / f'iter_{step}' / 'predictions.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]


def validations(checkpoint):
    return json.loads((checkpoint / 'trainer.json').read_text())['validations']


def without_validations(found):
    return {**found, 'trainer': {name: value for name, value in found['trainer'].items() if name != 'validations'}}


# ---- what it finds, and that training does not notice


@pytest.mark.parametrize('pack', [True, False], ids=['packed', 'padded'])
def test_training_is_bit_equal_with_and_without_validation(pack, validated, run, contents, differences):
    """Also where answers are drawn, and where a metric draws."""
    drawing = "from validation_hooks import drawn\nval_evaluator['metrics'].append(dict(type=drawn))\n"
    settings = dict(SHORT, pack_to_max_length=pack)
    plain = contents(run('plain', **settings) / 'iter_4.pth')
    sampled = {'val_evaluator.generation': dict(max_new_tokens=3, do_sample=True)}
    settings |= dict(val_interval=1, at_start=True)
    seen = contents(validated('seen', more=drawing, **sampled, **settings) / 'iter_4.pth')
    assert [row['iteration'] for row in seen['trainer']['validations']] == [0, 1, 2, 3]
    assert differences(without_validations(seen), without_validations(plain)) == []


@pytest.fixture(scope='module')
def own_loss(tiny_model, tiny_data, held_out):
    """The loss that transformers' model computes for each row by itself, weighted by learned tokens."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model('llava'), dtype=torch.float32).eval()
    processor = Processor(str(tiny_model('llava')), prompt_template='vicuna')
    dataset = SupervisedDataset(
        json.loads(held_out.read_text()), processor=processor, dataset_map_fn=llava_map_fn, max_length=96,
        template_map_fn=dict(type=chat_template_map_fn), image_folder=tiny_data('llava', rows=17).image_folder,
    )  # fmt: skip
    total = tokens = 0
    for sample in dataset.samples:
        ids, labels = (torch.from_numpy(array).long()[None] for array in (sample.input_ids, sample.labels))
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        images = processor.image_inputs(_decoded(sample, dataset)) if sample.images else {}
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels, **images).loss.item() * count
        tokens += count
    return total / tokens


def _decoded(sample, dataset):
    from vlmtune.data.sample_loading import load_images

    return load_images(sample, root=dataset.image_folder)


@pytest.mark.parametrize('pack', [True, False], ids=['packed', 'padded'])
def test_the_loss_is_the_models_own(pack, validated, own_loss):
    """Images are not augmented, though those of the training data are."""
    augmented = 'from vlmtune.data import color_jitter\n' + (
        "train_dataloader['dataset']['image_transform'] = dict(type=color_jitter, brightness=0.9)\n"
        "val_dataloader['dataset']['image_transform'] = dict(type=color_jitter, brightness=0.9)\n"
    )
    settings = dict(max_steps=1, max_epochs=None, at_start=True, pack_to_max_length=pack)
    first, *_ = records(validated('seen', more=augmented, **settings))
    assert first['iteration'] == 0
    assert first['loss'] == pytest.approx(own_loss, rel=1e-6)


def test_nothing_is_dropped_out(validated):
    """The weights behind step 2 have the same loss in a run that begins with them and has no dropout."""
    seen = validated('seen', val_evaluator=None, **SHORT)
    settings = dict(SHORT, lora_dropout=0.0, at_start=True, val_evaluator=None)
    again = validated('again', load_from=str(seen / 'iter_4.pth'), **settings)
    assert records(again)[0]['loss'] == records(seen)[-1]['loss']


def test_what_is_written_down(validated, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = validated('seen', more=TRACKER, **SHORT)
    found = records(work_dir)
    assert [row['iteration'] for row in found] == [2, 4]
    assert found[0].keys() == {'iteration', 'epoch', 'loss', 'exact_match', 'cer', 'seconds', 'samples', 'rules'}
    assert found[0]['rules'] == dict(loss='less', exact_match='greater', cer='less')
    assert found[0]['samples'] == 6
    assert found[1]['loss'] < found[0]['loss']
    rows = predictions(work_dir, 2)
    assert [row['index'] for row in rows] == list(range(6))
    assert rows[0]['references'] == ['The square is red.']
    assert rows[0]['scores'].keys() == {'exact_match', 'cer'}
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    scalars = [json.loads(line) for line in file.read_text().splitlines()]
    seen = {line['step']: line for line in scalars if 'val/loss' in line}
    assert seen.keys() == {2, 4}
    assert seen[4]['val/cer'] == found[1]['cer']
    assert f'validation behind step 4: loss {found[1]["loss"]:.4f}  exact_match 0.0000  cer ' in caplog.text
    assert validations(work_dir / 'iter_4.pth') == [
        {name: found[0][name] for name in ('iteration', 'loss', 'exact_match', 'cer')}
    ]


def test_without_metrics_nothing_is_asked_and_without_an_interval_once(validated):
    work_dir = validated('seen', val_evaluator=None, val_interval=None, **SHORT)
    assert [(row['iteration'], row.keys() & {'cer'}) for row in records(work_dir)] == [(4, set())]
    assert not (work_dir / 'validation' / 'iter_4').exists()


def test_only_so_many_rows_are_asked(validated):
    work_dir = validated('seen', **{'val_cfg.limit': 2}, **SHORT)
    assert len(predictions(work_dir, 4)) == 2
    assert records(work_dir)[0]['samples'] == 6


# ---- what cannot be


def test_a_broken_image_is_named(validated, held_out, tiny_data, tmp_path):
    images = tmp_path / 'images'
    shutil.copytree(tiny_data('llava', rows=17).image_folder, images)
    os.truncate(images / '000.png', 60)  # its header is whole
    settings = {'val_dataloader.dataset.image_folder': str(images), **SHORT}
    with pytest.raises(DataError, match=r'at the validation behind iteration 2: sample 0 \(data.json\[0\]\)'):
        validated('broken', **settings)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(val_cfg=None), r'val_dataloader needs val_cfg=dict\(type=ValLoop, interval=500\)'),
        (dict(val_interval=0), 'val_cfg.interval=0: expected optimizer steps, or None for the last step only'),
        ({'val_cfg.limit': 0}, 'val_cfg.limit=0: expected a number of rows, or None for all'),
        ({'val_dataloader.batch_size': 0}, 'val_dataloader.batch_size=0: expected a number of questions, at least 1'),
        (
            {'val_dataloader.dataset.type': 'vlmtune.data.StreamingDataset'},
            'val_dataloader: a StreamingDataset has no end; use a SupervisedDataset',
        ),
        (
            dict(save_best='val/err'),
            r"save_best: no score is called 'val/err'.*there are val/cer, val/exact_match, val/loss",
        ),
        ({'val_dataloader.num_workers': 2}, 'val_dataloader.num_workers: unknown argument; valid are batch_size, data'),
        ({'val_evaluator.generation.max_new_token': 2}, r'val_evaluator.generation: generate\(\) has no setting'),
        (dict(save_best=3), 'default_hooks.checkpoint.save_best: expected a text or None, got 3'),
        (
            dict(save_best='val/cer', val_dataloader=None),
            "save_best='val/cer' needs a validation, and there is no val_dataloader",
        ),
    ],
)
def test_mistakes_are_told_before_the_data(changes, message, validated, tmp_path):
    with pytest.raises(ConfigError, match=message):
        validated('wrong', data_path='/no/data.json', **changes)
    assert not (tmp_path / 'wrong').exists()


def test_held_out_data_that_is_not_there(validated):
    with pytest.raises(DataError, match=r'held-out data: .*gone.json.*; val_dataloader=None trains without'):
        validated('wrong', val_data_path='/gone.json', **SHORT)
