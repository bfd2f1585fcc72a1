"""How far a long walk has come, said from time to time."""

import logging
import time

logger = logging.getLogger(__name__)

_SECONDS = 5.0  # between two lines


class Progress:
    """Logs ``planned: 5,000 of 20,000, 1,000/s, about 15 s left`` every few seconds, but not when all is done.

    Args:
        what: is done, ``planned``.
        total: how many there are.
    """

    def __init__(self, what: str, *, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._started = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self._told < _SECONDS or self.done >= self.total:
            return
        self._told = now
        rate = self.done / (now - self._started)
        left = (self.total - self.done) / rate if rate else float('inf')
        rate_text = f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'
        logger.info(
            '%s: %s of %s, %s/s, about %.0f s left', self.what, f'{self.done:,}', f'{self.total:,}', rate_text, left
        )
