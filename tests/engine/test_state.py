"""Random generators and logged scalars survive a trip through JSON."""

import json
import math
import random
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from vlmtune.engine.state import (
    from_json,
    kept_rng,
    message_state,
    rng_state,
    seeded_rng_state,
    set_message_state,
    set_rng_state,
    to_json,
)


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)


def test_generators_go_on_where_they_were():
    draw()  # leaves a gauss behind
    np.random.standard_normal()
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


def test_generators_are_as_they_were_also_behind_a_failure():
    state = rng_state()
    with suppress(ZeroDivisionError), kept_rng():
        draw()
        raise ZeroDivisionError
    assert rng_state() == state


def test_scalars_come_back_with_their_counts():
    hub, other = MessageHub('state of one'), MessageHub('state of another')
    for i in range(100):
        hub.update_scalar('train/loss', i / 7, count=i + 1)
    hub.update_scalar('train/lr', 0.1)
    state = json.loads(json.dumps(message_state(hub)))
    set_message_state(other, state)
    assert len(state['train/loss']['values']) == 64
    for name in ('train/loss', 'train/lr'):
        mine, theirs = hub.get_scalar(name), other.get_scalar(name)
        assert mine.mean(10) == theirs.mean(10)
        assert mine.current() == theirs.current()
    assert message_state(other) == state


def test_a_wider_window_keeps_more():
    hub = MessageHub('state of a wide window')
    for i in range(300):
        hub.update_scalar('train/loss', i)
    assert len(message_state(hub, window=200)['train/loss']['values']) == 200


def test_values_that_are_not_finite_survive_strict_json():
    """JSON has no word for them, and readers other than Python's refuse what Python writes."""
    hub, other = MessageHub('state with nan'), MessageHub('state with nan, later')
    for value in (1.5, math.nan, math.inf, -math.inf, -0.0):
        hub.update_scalar('train/grad_norm', value)
    text = to_json(message_state(hub))
    json.loads(text, parse_constant=lambda word: pytest.fail(f'{word} is not JSON'))
    set_message_state(other, from_json(text))
    mine, theirs = (h.get_scalar('train/grad_norm').data[0] for h in (hub, other))
    assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    'value',
    [
        {}, [], None, True, 'nan', 1.5, 10**30, [1, [2.0, {}]], {'a': {'b': [None]}}, {3: 1, 7: 2}, {'x': {2.5: 'a'}},
        {'$float': 'x', 'other': 1}, 5e-324,
    ],
)  # fmt: skip
def test_plain_values_come_back(value):
    back = from_json(to_json(value))
    assert back == value
    assert type(back) is type(value)


def test_dicts_of_numbers_come_back_with_numbers():
    assert from_json(to_json(dict(milestones=Counter([3, 7, 7])))) == dict(milestones={3: 1, 7: 2})


def test_what_is_not_plain_is_not_saved():
    with pytest.raises(TypeError):
        to_json(dict(a=torch.ones(1)))


def test_generators_seeded_from_numbers_leave_those_of_the_process_alone():
    before = rng_state()
    states = [seeded_rng_state(words) for words in ([1, 2, 3], [1, 2, 3], [1, 2, 4])]
    assert rng_state() == before
    assert states[0] == states[1]
    for kind in ('torch', 'numpy', 'python'):
        assert states[0][kind] != states[2][kind] != before[kind]
    set_rng_state(from_json(to_json(states[0])))
    first = draw()
    set_rng_state(states[1])
    assert draw() == first
