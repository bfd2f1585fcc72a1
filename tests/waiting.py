"""For tests of processes and threads: wait for what happens, never for the clock."""

import time
from collections.abc import Callable


def until(happened: Callable[[], object], *, seconds: float = 600.0) -> None:
    """Returns as soon as ``happened()`` is true; the time only ends what hangs."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f'waited {seconds:g} s in vain'
        time.sleep(0.01)
