"""A dry run says what training would do, and leaves nothing behind."""

import re
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from vlmtune.apps.dry_run import describe_memory, dry_run
from vlmtune.apps.train import prepare_config, train
from vlmtune.engine.build import build_data
from vlmtune.engine.loops import count_steps
from vlmtune.engine.memory import MemoryEstimate, Sharding
from vlmtune.engine.worst_pack import run_pack, summarise_plan
from vlmtune.utils.errors import ModelError, TrainingError

RECIPE = 'llava_1_5_7b_lora_mix665k'


@pytest.fixture
def options(tiny_model, tiny_data):
    data = tiny_data('llava', rows=17)
    return dict(
        pretrained_model_name_or_path=str(tiny_model('llava')),
        data_path=str(data.data_path),
        image_folder=str(data.image_folder),
        evaluation_images=None,
        max_length=96,
        accumulative_counts=2,
        max_epochs=3,
        dtype='float32',
        plan_cache_dir=None,
    )


@pytest.fixture
def config(options, tmp_path):
    return prepare_config(RECIPE, work_dir=str(tmp_path / 'run'), overrides=options)


def test_what_it_prints(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(RECIPE, work_dir='run', overrides=options, dry_run=True)
    said = capsys.readouterr().out
    assert re.search(r'^llm +lora +[\d,]+ +[\d,]+ +0\.0002$', said, re.M)
    assert re.search(r'^projector +full +6,272 +6,272 +2e-05$', said, re.M)
    assert 'data: 17 samples, ' in said
    assert '13 with images, ' in said
    assert 'left out: 0 bad, 0 over-long; 0 shortened' in said
    assert re.search(r'packs: (9|10) in the first epoch, density 0\.\d+; 5 optimizer steps in the first epoch', said)
    assert '15 in all (3 epochs)' in said
    assert re.search(r'^longest: \d+ tokens, \d+ patches: data.json\[\d+\] \(', said, re.M)
    assert re.search(r'^most image patches: \d+ tokens, \d+ patches: data.json', said, re.M)
    assert 'memory, estimated for the hardest pack, GiB per process: weights 0.00, ' in said
    assert 'the hardest pack was not run: there is no accelerator here' in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_does_not_matter(options, tmp_path, capsys):
    (tmp_path / 'run' / 'iter_5.pth').mkdir(parents=True)
    train(RECIPE, work_dir=str(tmp_path / 'run'), overrides=options, dry_run=True)
    assert 'optimizer steps' in capsys.readouterr().out


def test_the_weights_are_not_read(config, options, tmp_path, capsys):
    """A model folder without its weights is enough."""
    source = Path(options['pretrained_model_name_or_path'])
    folder = tmp_path / 'model'
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != '.safetensors':
            (folder / path.name).write_bytes(path.read_bytes())
    overrides = {**options, 'pretrained_model_name_or_path': str(folder)}
    dry_run(prepare_config(RECIPE, work_dir=str(tmp_path / 'run'), overrides=overrides))
    assert 'nothing was trained' in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there(options, tmp_path):
    overrides = {**options, 'pretrained_model_name_or_path': str(tmp_path / 'none')}
    with pytest.raises(ModelError, match=r'no model at .*none; expected a folder with config.json'):
        train(RECIPE, overrides=overrides, dry_run=True)


def test_quantised_recipes_need_no_gpu(tiny_model, options, capsys):
    overrides = {**options, 'quantization': 'nf4', 'dtype': 'bfloat16'}
    train(RECIPE, overrides=overrides, dry_run=True)
    assert re.search(r'^llm +lora', capsys.readouterr().out, re.M)


def test_the_hardest_packs_of_all_epochs(config):
    _, loader = build_data(config)
    sampler, dataset = loader.batch_sampler, loader.dataset
    plan = summarise_plan(loader, steps=count_steps(sampler, max_epochs=3))
    assert (plan.epochs, plan.first_steps, plan.steps) == (3, 5, 15)
    packs = []
    for epoch in range(3):
        sampler.start_epoch(epoch)
        packs += sampler.plan
    sampler.start_epoch(0)
    assert plan.longest.load.tokens == max(dataset.lengths[pack].sum() for pack in packs)
    assert plan.most_patches.load.patches == max(dataset.patches[pack].sum() for pack in packs)
    keys = [key.sample for key in plan.longest.keys]
    assert dataset.lengths[keys].sum() == plan.longest.load.tokens
    assert dataset.supervised[keys].sum() == plan.longest.load.supervised
    assert plan.density == pytest.approx(dataset.lengths.sum() / (plan.packs * 96))
    assert sampler.epoch == 0


def test_batches_count_their_padding(options):
    overrides = {**options, 'pack_to_max_length': False, 'batch_size': 4}
    _, loader = build_data(prepare_config(RECIPE, overrides=overrides))
    plan = summarise_plan(loader, steps=7)
    batch = loader.collate_fn([loader.dataset[key] for key in plan.longest.keys])
    assert plan.longest.load.tokens == batch['input_ids'].numel()
    assert plan.density < 0.9
    assert plan.epochs == 3


def test_one_step_on_the_hardest_pack(config):
    """On the CPU here; a dry run does it where there is an accelerator."""
    processor, loader = build_data(config)
    plan = summarise_plan(loader, steps=15)
    ran = run_pack(config, processor=processor, loader=loader, pack=plan.longest, device=torch.device('cpu'))
    assert 4 < ran.loss < 9  # ln(448) is 6.1
    assert ran.seconds > 0
    assert ran.peak_mib > 100


class _Greedy(SGD):
    """An optimizer that wants more memory than there is."""

    def step(self, closure=None):
        torch.empty(len(self.param_groups) << 50 if len(self.param_groups) > 1 else 0, dtype=torch.uint8)


def test_a_pack_that_does_not_fit(config):
    processor, loader = build_data(config)
    plan = summarise_plan(loader, steps=15)
    config.optim_wrapper.optimizer = dict(type=_Greedy, lr=1.0)
    with pytest.raises(TrainingError, match='out of memory in the dry run on cpu'):
        run_pack(config, processor=processor, loader=loader, pack=plan.longest, device=torch.device('cpu'))


def test_memory_in_words():
    estimate = MemoryEstimate(*(2.0**30 * n for n in (1, 2, 3, 4, 5)))
    assert describe_memory(estimate, sharding=Sharding(stage=2, ranks=8)) == (
        'memory, estimated for the hardest pack, GiB per process, ZeRO stage 2 over 8 processes: '
        'weights 1.00, gradients 2.00, optimizer 3.00, activations 4.00, loss 5.00; in all 15.00'
    )
