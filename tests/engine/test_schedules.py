"""Schedules written in epochs run in steps."""

from functools import partial

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR, OneCycleLR, PolyLR

from vlmtune.engine.schedules import (
    fast_forward,
    load_schedules,
    schedule_changes,
    schedule_states,
    schedules_in_steps,
)
from vlmtune.engine.state import from_json, to_json


def convert(*schedules, max_steps=100, max_epochs=2):
    return schedules_in_steps(
        [dict(s, convert_to_iter_based=True) for s in schedules], max_steps=max_steps, max_epochs=max_epochs
    )


def test_epochs_and_fractions_of_them_become_steps():
    warmup, cosine = dict(type='A', begin=0, end=0.06), dict(type='B', begin=0.06, end=2, T_max=1.94)
    assert convert(warmup, cosine) == [
        dict(type='A', by_epoch=False, begin=0, end=3),
        dict(type='B', by_epoch=False, begin=3, end=100, T_max=97),
    ]


def test_the_end_of_training_is_hit_exactly():
    """Also where epochs differ in length, or the last one is cut."""
    assert convert(dict(end=1.5), max_steps=77, max_epochs=1.5)[0]['end'] == 77


def test_every_setting_that_counts_epochs():
    (found,) = convert(dict(milestones=[1, 1.5], step_size=1, total_steps=2))
    assert (found['milestones'], found['step_size'], found['total_steps']) == ([50, 75], 50, 100)


@pytest.mark.parametrize('schedule', [dict(by_epoch=False, begin=3, end=50), dict(by_epoch=True, end=2), dict(begin=1)])
def test_others_pass_through(schedule):
    assert schedules_in_steps(schedule, max_steps=10, max_epochs=2) == [schedule]


def test_one_in_steps_already_is_not_converted_twice():
    assert convert(dict(by_epoch=False, begin=3, end=50)) == [dict(by_epoch=False, begin=3, end=50)]


def test_a_warm_up_shorter_than_two_steps_is_left_out():
    """mmengine refuses an empty one; one of a single step would leave the lr at its start for the whole run."""
    warmup, cosine = dict(type='A', begin=0, end=0.06), dict(type='B', begin=0.06, end=2)
    for steps in (10, 20, 40):
        assert [s['type'] for s in convert(warmup, cosine, max_steps=steps)] == ['B']
    assert [s['type'] for s in convert(warmup, cosine, max_steps=67)] == ['A', 'B']


def test_the_config_is_not_changed():
    schedule = dict(begin=0, end=1, convert_to_iter_based=True)
    schedules_in_steps(schedule, max_steps=10, max_epochs=1)
    assert schedule == dict(begin=0, end=1, convert_to_iter_based=True)


# ---- saved and taken up again


def build(*classes, lr=0.1, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made = [make(optimizer) for make in classes]
    return optimizer, made


LINEAR = partial(LinearLR, start_factor=0.1, begin=0, end=4, by_epoch=False)
COSINE = partial(CosineAnnealingLR, T_max=16, begin=4, end=20, by_epoch=False)
EVERY_KIND = [
    [LINEAR, COSINE],
    [partial(MultiStepLR, milestones=[3, 7, 7], gamma=0.5, by_epoch=False)],
    [partial(OneCycleLR, eta_max=0.3, total_steps=20, by_epoch=False)],
    [partial(PolyLR, begin=2, end=15, by_epoch=False), partial(ExponentialLR, gamma=0.9, by_epoch=True)],
]


def go(schedulers, steps, *, per_epoch=8, first=0):
    rates = []
    for step in range(first, steps):
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if (step + 1) % per_epoch == 0:
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
        rates.append(schedulers[0].optimizer.param_groups[0]['lr'])
    return rates


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('classes', EVERY_KIND, ids=['linear+cosine', 'multi step', 'one cycle', 'poly+exponential'])
def test_a_schedule_goes_on_from_json_as_if_it_had_not_stopped(classes):
    _, whole = build(*classes)
    expected = go(whole, 19)
    optimizer, first = build(*classes)
    go(first, 5)
    states, rate = from_json(to_json(schedule_states(first))), optimizer.param_groups[0]['lr']
    other, second = build(*classes)
    other.param_groups[0]['lr'] = rate  # which the optimizer's state holds
    assert schedule_changes(second, states) == []
    load_schedules(second, states)
    assert go(second, 19, first=5) == expected[5:]
    assert len(set(expected)) > 2


@pytest.mark.parametrize('classes', EVERY_KIND, ids=['linear+cosine', 'multi step', 'one cycle', 'poly+exponential'])
@pytest.mark.parametrize('epochs', [[5], [8, 3], [8, 8, 0]])
@pytest.mark.filterwarnings('ignore')
def test_fast_forward_is_as_if_the_steps_had_been_made(classes, epochs):
    _, whole = build(*classes)
    expected = go(whole, 19)
    _, other = build(*classes)
    fast_forward(other, steps_of_epochs=epochs)
    assert go(other, 19, first=sum(epochs)) == expected[sum(epochs) :]


def test_fast_forward_is_silent(recwarn):
    fast_forward(build(LINEAR, COSINE)[1], steps_of_epochs=[5])
    assert not recwarn.list


def test_changed_settings_are_named():
    states = from_json(to_json(schedule_states(build(LINEAR, COSINE)[1])))
    assert schedule_changes(build(LINEAR, COSINE)[1], states) == []
    assert schedule_changes(build(LINEAR, COSINE, lr=0.2)[1], states) == []  # whoever compares rates knows
    longer = build(LINEAR, partial(COSINE, end=40, T_max=36))[1]
    assert schedule_changes(longer, states) == [
        'CosineAnnealingLR.T_max=36, not 16',
        'CosineAnnealingLR.end=40, not 20',
    ]
    assert schedule_changes(build(LINEAR)[1], states) == ['other schedules']
    for broken in (None, [], [1, 2], [{}, {}]):
        assert schedule_changes(build(LINEAR, COSINE)[1], broken) == ['other schedules']
