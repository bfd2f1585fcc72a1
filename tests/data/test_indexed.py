import numpy as np
import pytest

from vlmtune.data.indexed import Indexed


class Squares(Indexed[int]):
    def __len__(self):
        return 5

    def at(self, index):
        assert 0 <= index < 5
        return index**2


def test_items_are_made_by_their_place():
    squares = Squares()
    assert list(squares) == squares[:] == [0, 1, 4, 9, 16]
    assert (squares[-1], squares[np.int64(3)]) == (16, 9)
    assert squares[3:0:-2] == [9, 1]
    assert squares[4:99] == [16]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            squares[outside]
