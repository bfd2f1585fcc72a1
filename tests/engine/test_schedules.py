"""Schedules written in epochs run in steps."""

import pytest

from vlmtune.engine.schedules import schedules_in_steps


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
