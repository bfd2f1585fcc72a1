"""Hooks for tests of the validation; copied to where the recipes are, because runs in other processes import them."""

import os
import random
from itertools import count

from mmengine.hooks import Hook


class Interrupt(Hook):
    """Sends a signal in the validation behind step ``at``, once: before it, or at the n-th call of the model."""

    def __init__(self, at, marker, number, call=0):
        self.at, self.marker, self.number, self.left = at, marker, number, call

    def before_val(self, runner):
        if runner.train_loop.steps_done == self.at and not os.path.exists(self.marker):
            if self.left:
                runner.model.model.register_forward_pre_hook(self.count)
            else:
                self.send()

    def send(self):
        open(self.marker, 'w').close()
        os.kill(os.getpid(), self.number)

    def count(self, *_):
        self.left -= 1
        if not self.left:
            self.send()


class Told(Hook):
    """Puts losses that a test wants into the history, by step."""

    priority = 'VERY_HIGH'

    def __init__(self, **losses):
        self.losses = losses

    def after_val(self, runner):
        row = runner.val_loop.history[-1]
        row['loss'] = self.losses[f'at_{row["iteration"]}']


def drawn(predictions, references):
    """A score that is none."""
    return random.random()


def lengths(predictions, references):
    """Two scores, with names of their own."""
    return dict(longest=max(map(len, predictions)), shortest=min(map(len, predictions)))


_CALLS = count(1)


def step_number(predictions, references):
    """A score that grows with every validation of a process; of one row it has none."""
    return next(_CALLS) if len(predictions) > 1 else float('nan')
