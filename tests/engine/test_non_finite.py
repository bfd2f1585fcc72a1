"""A loss or a norm that is not finite: what is written, skipped and saved; two ranks are in test_data_failures.py."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.data import SupervisedDataset
from vlmtune.engine.non_finite import only_finite
from vlmtune.engine.strategies import SingleDeviceStrategy
from vlmtune.utils.errors import ConfigError, TrainingError

IN_ORDER = dict(pack_to_max_length=False, shuffle=False, max_steps=5, max_epochs=None, save_steps=1)
MARK = 3  # a token that stands nowhere else
SKIP = 'train_cfg.max_skipped_steps'


def ruin_loss(loss):
    return loss * float('nan')


def ruin_value(loss):
    """Infinite, with a finite gradient."""
    return loss + float('inf')


def ruin_gradients(loss):
    """The loss is finite, its gradient is not."""
    loss.register_hook(lambda gradient: gradient * float('inf'))
    return loss


@pytest.fixture
def bad_samples(monkeypatch):
    """``bad_samples(ruin, 5)``: the loss of every micro-batch with sample 5 goes through ``ruin``, in every epoch."""

    def set_bad(ruin, *samples):
        load, forward = SupervisedDataset.__getitem__, SingleDeviceStrategy.forward

        def getitem(self, key):
            tensors = load(self, key)
            if key.sample in samples:
                tensors['input_ids'][0] = MARK
            return tensors

        def ruined(self, batch):
            loss = forward(self, batch)
            return ruin(loss) if (batch['input_ids'] == MARK).any() else loss

        monkeypatch.setattr(SupervisedDataset, '__getitem__', getitem)
        monkeypatch.setattr(SingleDeviceStrategy, 'forward', ruined)

    return set_bad


def lines(work_dir):
    return [json.loads(line) for line in (work_dir / 'non_finite.jsonl').read_text().splitlines()]


def saved(work_dir):
    return sorted(path.name for path in work_dir.glob('iter_*'))


def weights(work_dir, step):
    return load_file(work_dir / f'iter_{step}.pth' / 'model.safetensors')


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_ends_the_run_and_a_resume_meets_it_again_or_goes_past_it(run, bad_samples, losses, tmp_path):
    bad_samples(ruin_loss, 5)  # the second micro-batch of iteration 3
    work_dir = tmp_path / 'a'
    for resume in (False, True):
        with pytest.raises(TrainingError) as caught:
            run('a', resume=resume, **IN_ORDER)
        assert str(caught.value) == (
            'the loss is nan at iteration 3 (rank 0, micro-batch 1: sample 5 (data.json[5])); no weight was changed by '
            f'this step. Look at the samples ({work_dir}/non_finite.jsonl names all of them), or lower lr; --resume '
            'goes on from the last checkpoint, and past this step with train_cfg.max_skipped_steps=1'
        )
        assert saved(work_dir) == ['iter_1.pth', 'iter_2.pth']
        assert (work_dir / 'last_checkpoint').read_text().strip() == 'iter_2.pth'
    line = dict(iteration=3, epoch=0, rank=0, kind='loss', micro_batch=1, value='nan', samples=[[5, 'data.json[5]']])
    assert lines(work_dir) == [line, line]
    run('a', resume=True, **{SKIP: 1}, **IN_ORDER)
    assert saved(work_dir)[-1] == 'iter_5.pth'
    assert saved(work_dir) == ['iter_1.pth', 'iter_2.pth', 'iter_4.pth', 'iter_5.pth']  # 3 was skipped
    assert not same(weights(work_dir, 2), weights(work_dir, 4))
    assert all(map(math.isfinite, losses(work_dir / 'iter_5.pth')))


def test_a_skipped_step_counts_but_its_loss_is_not_logged(run, bad_samples, contents, caplog):
    bad_samples(ruin_value, 5)
    work_dir = run('a', **{SKIP: 1}, **IN_ORDER)
    assert saved(work_dir) == ['iter_1.pth', 'iter_2.pth', 'iter_4.pth', 'iter_5.pth']  # 3 was skipped
    messages = contents(work_dir / 'iter_5.pth')['messages']
    assert [len(messages[f'train/{name}']['values']) for name in ('loss', 'grad_norm', 'lr', 'samples')] == [4, 4, 5, 5]
    assert messages['train/skipped_steps']['values'] == [1]
    logged = [json.loads(line) for line in next(work_dir.glob('*/metrics.jsonl')).read_text().splitlines()]
    assert [step['step'] for step in logged if 'loss' not in step and 'grad_norm' not in step] == [3]
    assert 'data.json[5])); skipped, 1 of at most 1 such steps' in caplog.text
    assert 'iteration 3 was skipped: saving waits for a step that goes well' in caplog.text


def test_gradients(run, bad_samples, losses, caplog):
    """Of the norm no micro-batch is known: all samples of the step are named."""
    bad_samples(ruin_gradients, 5)
    work_dir = run('a', **{SKIP: 1}, **IN_ORDER)
    assert saved(work_dir) == ['iter_1.pth', 'iter_2.pth', 'iter_4.pth', 'iter_5.pth']  # 3 was skipped
    assert len(losses(work_dir / 'iter_5.pth')) == 5  # which are finite
    (line,) = lines(work_dir)
    assert (line['kind'], line['micro_batch']) == ('norm of the gradients', None)
    assert line['value'] in ('nan', 'inf')
    assert line['samples'] == [[4, 'data.json[4]'], [5, 'data.json[5]']]
    assert 'its samples: sample 4 (data.json[4]), sample 5 (data.json[5])' in caplog.text


def test_the_count_is_of_the_whole_run(run, bad_samples, tmp_path):
    """The second bad step comes after a resume."""
    bad_samples(ruin_loss, 2, 7)  # iterations 2 and 4
    with pytest.raises(TrainingError, match='at iteration 4 .*, and 1 were skipped before it. .*max_skipped_steps=2'):
        run('a', **{SKIP: 1}, **IN_ORDER)
    with pytest.raises(TrainingError, match='at iteration 4 .*, and 1 were skipped before it'):
        run('a', resume=True, **{SKIP: 1}, **IN_ORDER)
    assert saved(tmp_path / 'a')[-1] == 'iter_3.pth'
    run('a', resume=True, **{SKIP: 2}, **IN_ORDER)


def test_a_lower_loss_scale_is_no_bad_step(run, monkeypatch):
    """float16 finds its scale by steps that overflow."""
    step, calls = SingleDeviceStrategy.optimizer_step, iter(range(10))
    monkeypatch.setattr(
        SingleDeviceStrategy, 'optimizer_step', lambda self: float('inf') if next(calls) == 1 else step(self)
    )
    monkeypatch.setattr(SingleDeviceStrategy, 'lowered_loss_scale', True)
    work_dir = run('a', **{**IN_ORDER, 'max_steps': 3})
    assert not (work_dir / 'non_finite.jsonl').exists()
    logged = [json.loads(line) for line in next(work_dir.glob('*/metrics.jsonl')).read_text().splitlines()]
    assert ['grad_norm' in step for step in logged] == [True, False, True]
    assert all('loss' in step for step in logged)


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch, tmp_path):
    step, calls = SingleDeviceStrategy.optimizer_step, iter(range(10))

    def overflow(self):
        norm = step(self)
        if next(calls) == 1:
            next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[3] = float('inf')
        return norm

    monkeypatch.setattr(SingleDeviceStrategy, 'optimizer_step', overflow)
    with pytest.raises(
        TrainingError, match='hold numbers that are not finite after iteration 2, so it is not saved; l'
    ):
        run('a', **IN_ORDER)
    assert saved(tmp_path / 'a') == ['iter_1.pth']


def test_only_finite_hands_on_all_weights_before_it_complains():
    """Other ranks may have to take part in each of them."""
    large = torch.full((4,), 3e38)  # the sum overflows, the numbers do not
    good = [('a', torch.ones(3)), ('b', large)]
    assert [name for name, _ in only_finite(good, iteration=1)] == ['a', 'b']
    handed_on = []
    bad = [('x', torch.tensor([math.nan])), *good, ('y', -large / 0)]
    with pytest.raises(TrainingError, match='^x and 1 more tensors hold'):
        handed_on.extend(name for name, _ in only_finite(bad, iteration=1))
    assert handed_on == ['x', 'a', 'b', 'y']


@pytest.mark.parametrize('steps', [-1, 1.5, True])
def test_mistakes(steps, run):
    with pytest.raises(ConfigError, match='max_skipped_steps'):
        run('a', **{SKIP: steps})
