"""One iteration is one optimizer step; how samples fall into micro-batches does not change it."""

import math
import os
import signal

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file

from vlmtune.apps.train import prepare_config
from vlmtune.engine.build import build_data, build_model
from vlmtune.engine.strategies import SingleDeviceStrategy
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError, Stopped, TrainingError

SGD = dict(recipe=dict(optimizer='SGD'), lora_dropout=0.0, max_norm=1e9, lr=0.5)
IN_ORDER = dict(pack_to_max_length=False, shuffle=False)


def weights(work_dir, step):
    return load_file(work_dir / f'iter_{step}.pth' / 'model.safetensors')


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_accumulation_equals_larger_batches(run, losses):
    """SGD, so that a constant factor shows. 1e-6 of weights that moved by 0.1: sums in another order."""
    settings = {**SGD, **IN_ORDER, 'max_steps': 4, 'max_epochs': None}
    one = run('one', batch_size=4, accumulative_counts=1, **settings)
    two = run('two', batch_size=2, accumulative_counts=2, **settings)
    four = run('four', batch_size=1, accumulative_counts=4, **settings)
    start = run('start', **{**settings, 'lr': 0.0})
    assert largest_difference(weights(one, 4), weights(start, 4)) > 0.05
    assert largest_difference(weights(one, 4), weights(two, 4)) < 1e-6
    assert largest_difference(weights(one, 4), weights(four, 4)) < 1e-6
    for a, b in zip(losses(one / 'iter_4.pth'), losses(four / 'iter_4.pth'), strict=True):
        assert abs(a - b) < 1e-6 * a


def test_packed_equals_one_sample_a_time(run):
    """The same samples in one step, packed or each alone: the same weights."""
    settings = {**SGD, 'max_steps': 1, 'max_epochs': None}
    packed = run('packed', max_length=96, accumulative_counts=100, **settings)  # more than there are packs: one step
    alone = run('alone', **{**settings, **IN_ORDER}, accumulative_counts=100)
    assert largest_difference(weights(packed, 1), weights(alone, 1)) < 1e-6


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens(run, losses, write_recipe, tmp_path):
    """Not the mean of the micro-batches' means."""
    done = run('done', accumulative_counts=3, lora_dropout=0.0, max_steps=1, max_epochs=None)
    cfg = prepare_config(str(tmp_path / 'recipe.py'), overrides=dict(lora_dropout=0.0, accumulative_counts=3))
    processor, loader = build_data(cfg)
    model = build_model(cfg, processor=processor).eval()
    batches = [batch for _, batch in zip(range(3), loader, strict=False)]
    counts = [(batch['labels'][:, 1:] != IGNORE_INDEX).sum() for batch in batches]
    with torch.no_grad():
        sums = [model(**batch) for batch in batches]
    assert len({int(count) for count in counts}) > 1
    assert losses(done / 'iter_1.pth')[0] == pytest.approx((sum(sums) / sum(counts)).item(), rel=1e-6)
    means = sum(s / c for s, c in zip(sums, counts, strict=True)) / 3
    assert abs(means - sum(sums) / sum(counts)) > 1e-4


@pytest.mark.parametrize(
    ('settings', 'steps'),
    [
        (dict(max_epochs=1), 5),
        (dict(max_epochs=2), 10),
        (dict(max_epochs=0.5), 2),
        (dict(max_epochs=1.2), 6),
        (dict(max_epochs=None, max_steps=7), 7),
        (dict(max_epochs=1, accumulative_counts=4), 3),  # the last step is a smaller one
    ],
)
def test_how_many_steps(settings, steps, run, losses):
    done = run('done', **settings)
    assert [path.name for path in done.glob('iter_*')] == [f'iter_{steps}.pth']
    assert len(losses(done / f'iter_{steps}.pth')) == steps


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(max_epochs=2, max_steps=3), r'train_cfg: give max_epochs or max_steps, not both \(got 2 and 3\)'),
        (dict(max_epochs=None), r'train_cfg: give max_epochs or max_steps, not both \(got None and None\)'),
        (dict(max_epochs=0.01), 'train_cfg: max_epochs=0.01 makes no optimizer step; an epoch has 5'),
        (dict(max_epochs=None, max_steps=0), 'max_steps=0 makes no optimizer step|max_steps: expected a positive'),
    ],
)
def test_mistakes(settings, message, run):
    with pytest.raises(ConfigError, match=message):
        run('none', **settings)


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    """lr is so large that the first step ruins the weights; nothing is saved after that."""
    settings = {**SGD, 'lr': 1e30, 'max_steps': 5, 'max_epochs': None, 'horizon': 100, 'save_steps': 1}
    with pytest.raises(TrainingError, match=r'at iteration 2 \(.*\); no weight was changed by this step. .* lower lr'):
        run('ruined', **settings)
    assert not (tmp_path / 'ruined' / 'iter_2.pth').exists()


@pytest.mark.parametrize('save_steps', [1, 1000], ids=['just saved', 'not saved'])
def test_a_signal_saves_after_the_step_and_leaves(save_steps, run, contents, differences, monkeypatch, tmp_path):
    """It comes while iteration 2 is learned; ranks agree when they meet for iteration 3. Nothing of the run is lost."""
    settings = dict(max_steps=5, max_epochs=None, save_steps=save_steps, dataloader_num_workers=1)
    forward, calls = SingleDeviceStrategy.forward, iter(range(100))

    def interrupted(self, batch):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SingleDeviceStrategy, 'forward', interrupted)
        with pytest.raises(Stopped, match='stopped by SIGTERM after step 3; saved in .*iter_3.pth') as caught:
            run('a', **settings)
    assert caught.value.exit_code == 143
    assert len(list((tmp_path / 'a').glob('iter_*'))) == (3 if save_steps == 1 else 1)
    ends = [
        contents(run(name, resume=name == 'a', **{**settings, 'save_steps': 1000}) / 'iter_5.pth')
        for name in ('a', 'b')
    ]
    assert differences(*ends) == []


def test_the_schedule_runs_in_steps(run, contents):
    """Warm-up of 10 % of 2 epochs is 1 step and left out; the cosine goes from lr to nearly 0 in 10 steps."""
    rates = contents(run('done', lr=1e-2) / 'iter_10.pth')['messages']['train/lr']['values']
    expected = [1e-2 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert len(rates) == 10
    assert rates[1:] == pytest.approx(expected, rel=1e-3)


def test_a_config_reports_the_effective_loop(write_recipe, tmp_path):
    cfg = prepare_config(str(write_recipe(tmp_path / 'recipe.py')), overrides=dict(accumulative_counts=3))
    assert isinstance(cfg, Config)
    _, loader = build_data(cfg)
    assert loader.batch_sampler.accumulative_counts == 3
