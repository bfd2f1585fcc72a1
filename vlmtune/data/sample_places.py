"""Where samples come from, for messages and reports."""

from collections.abc import Sequence
from typing import Any, NamedTuple

_NAMED = 5  # samples in a message


class Place(NamedTuple):
    """Where a sample comes from: the number of its row, and for people ``train.jsonl:812``."""

    row: int
    where: str

    def __str__(self) -> str:
        return f'sample {self.row} ({self.where})'


def places(dataset: Any, pack: Sequence[Any]) -> list[Place]:
    """The samples of a micro-batch.

    Args:
        dataset: planned or a stream.
        pack: what its sampler asked for.
    """
    keys = [key.sample for key in pack]
    rows = [dataset.row_of(key) if isinstance(key, int) else key.row for key in keys]
    return [Place(row, dataset.where(key)) for row, key in zip(rows, keys, strict=True)]


def in_words(samples: Sequence[Place]) -> str:
    """``sample 3 (train.jsonl:4), sample 9 (train.jsonl:10) and 7 more``."""
    named = ', '.join(str(sample) for sample in samples[:_NAMED])
    return named + (f' and {len(samples) - _NAMED} more' if len(samples) > _NAMED else '')
