"""Lines, means and the numbers beside an axis."""

import re

import pytest

from vlmtune.apps.report.svg import Line, averaged, plot, ticks


def test_no_spike_is_lost_and_lines_are_short():
    points = [(i, 1.0) for i in range(20000)]
    points[12345] = (12345, 50.0)
    svg = plot([Line(points)], label='x')
    places = re.findall(r'[ML]([\d.]+) ([\d.]+)', re.search(r'class="line c0" d="([^"]+)', svg)[1])
    assert len(places) <= 303
    assert min(float(y) for _, y in places) < 20
    assert plot([Line([])], label='x') == ''
    assert 'NaN' not in plot([Line([(3, 0.0)])], label='one point') + plot([Line([(1, -2.0), (2, -2.0)])], label='flat')


def test_means_keep_to_the_middle():
    line = [(float(i), float(i)) for i in range(50)]
    assert averaged(line, window=11) == line
    assert averaged([(0, 0.0), (1, 9.0), (2, 0.0)], window=3) == [(0, 0.0), (1, 3.0), (2, 0.0)]


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 100, [20, 40, 60, 80, 100]), (3, 3, [3]), (-1e-5, 1e-5, [-1e-5, 0, 1e-5])],
)
def test_numbers_beside_an_axis_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12) or len(expected) == 3
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in ticks(low, high))
