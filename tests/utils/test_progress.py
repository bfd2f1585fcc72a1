import pytest

from vlmtune.utils.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    return now


def test_it_is_told_every_few_seconds_and_not_at_the_end(clock, caplog):
    progress = Progress('rows checked', total=20_000)
    with caplog.at_level('INFO', logger='vlmtune'):
        for _ in range(20):
            clock[0] += 1
            progress.add(1000)
    assert caplog.messages == [
        'rows checked: 5,000 of 20,000, 1,000/s, about 15 s left',
        'rows checked: 10,000 of 20,000, 1,000/s, about 10 s left',
        'rows checked: 15,000 of 20,000, 1,000/s, about 5 s left',
    ]
    assert (progress.done, progress.seconds) == (20_000, 20.0)


def test_slow_work_has_a_rate_below_one(clock, caplog):
    progress = Progress('questions answered', total=3)
    with caplog.at_level('INFO', logger='vlmtune'):
        clock[0] = 20.0
        progress.add(0)
        clock[0] = 40.0
        progress.add(2)
    assert caplog.messages[1] == 'questions answered: 2 of 3, 0.05/s, about 20 s left'
