"""Rows of a stream, and what a sampler makes of them."""

from vlmtune.data import build_train_loader


def row(number, *, words=None):
    answer = ' '.join(['word'] * (words if words is not None else 1 + number % 7))
    talk = [{'from': 'human', 'value': f'Number {number}?'}, {'from': 'gpt', 'value': answer}]
    return {'id': str(number), 'conversations': talk}


class Counted:
    """Counts the rows that were read."""

    def __init__(self, count):
        self.rows, self.read = [row(i) for i in range(count)], 0

    def __iter__(self):
        for each in self.rows:
            self.read += 1
            yield each


def sampler_of(dataset, **settings):
    settings = {'seed': 0, 'pack_to_max_length': True, **settings}
    return build_train_loader(dataset, **settings).batch_sampler


def take(sampler, steps):
    """The places of the samples of so many steps, pack by pack, as the loop takes them."""
    stream, out = iter(sampler), []
    for _ in range(steps):
        packs = [next(stream) for _ in range(sampler.next_step())]
        assert packs == sampler.current_packs()
        out.append([[key.sample.where for key in pack] for pack in packs])
        sampler.finish_step()
    return out


def flat(steps):
    return [place for step in steps for pack in step for place in pack]
