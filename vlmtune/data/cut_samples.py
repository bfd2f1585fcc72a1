"""Long plain texts in pieces: one planned row, several samples."""

import numpy as np

from vlmtune.data.bad_rows import BadSample
from vlmtune.data.indexed import Indexed
from vlmtune.data.sample_table import SampleTable
from vlmtune.structures import Sample


def can_be_cut(sample: Sample) -> bool:
    """Whether a sample is plain text: no image, and every token learned."""
    return not sample.images and np.array_equal(sample.labels, sample.input_ids)


def pieces_of(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """int64[N]: how many pieces samples of int64[N] tokens make. A last piece of one token teaches nothing: none."""
    return 1 + np.maximum(lengths - 2, 0) // max_length


def piece(sample: Sample, number: int, max_length: int) -> Sample:
    """One piece of a sample; a sample that is short enough is its own only piece."""
    if len(sample) <= max_length:
        return sample
    part = slice(number * max_length, (number + 1) * max_length)
    return Sample(sample.input_ids[part], sample.labels[part])


def pieces(sample: Sample, max_length: int) -> list[Sample]:
    """All pieces of a sample."""
    return [piece(sample, number, max_length) for number in range(int(pieces_of(np.array(len(sample)), max_length)))]


class CutSamples(Indexed[Sample]):
    """The samples of a table, the long ones in pieces, with the doors of the table.

    Args:
        table: the planned rows, each whole.
        max_length: tokens of the longest piece.
    """

    def __init__(self, table: SampleTable, *, max_length: int) -> None:
        self.table, self.max_length = table, max_length
        self.row_count = table.row_count
        whole = table.numbers('length')
        pieces = pieces_of(whole, max_length)
        self._whole = np.repeat(np.arange(len(whole)), pieces)  # int64[N], of every piece
        self._number = np.arange(len(self._whole)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._lengths = np.minimum(whole[self._whole] - self._number * max_length, max_length)
        self._is_cut = whole[self._whole] > max_length
        self.rows = table.rows[self._whole]  # int64[N], of every piece

    def __len__(self) -> int:
        return len(self._whole)

    def at(self, index: int) -> Sample:
        """One piece."""
        return piece(self.table[int(self._whole[index])], int(self._number[index]), self.max_length)

    def numbers(self, name: str) -> np.ndarray:
        """int64[N]: 'length', 'supervised', 'patches' or 'truncated' of every piece."""
        if name == 'length':
            return self._lengths
        values = self.table.numbers(name)[self._whole]
        return np.where(self._is_cut, self._lengths - 1, values) if name == 'supervised' else values

    def problems(self, kind: int) -> list[BadSample]:
        """The rows of one kind, as of the table."""
        return self.table.problems(kind)
