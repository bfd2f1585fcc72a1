"""Random generators and logged scalars survive a trip through JSON."""

import json
import random

import numpy as np
import torch
from mmengine.logging import MessageHub

from vlmtune.engine.state import message_state, rng_state, set_message_state, set_rng_state


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
