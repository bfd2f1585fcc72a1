"""What an error of a library is told as."""

import pytest

from vlmtune.utils.errors import first_line


@pytest.mark.parametrize(
    ('said', 'told'),
    [('', 'OSError'), ('\n \n', 'OSError'), ('\n no file \nat all', 'no file'), ('x' * 900, 'x' * 300)],
)
def test_the_first_line_of_an_error(said, told):
    assert first_line(OSError(said)) == told
