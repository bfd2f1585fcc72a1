"""``vlmtune report``: what came of one or several runs, on one page that needs nothing else."""

import logging
from collections.abc import Sequence
from pathlib import Path

from vlmtune.apps.report.page import as_page
from vlmtune.apps.report.png import write_png
from vlmtune.apps.report.run_files import read_runs
from vlmtune.utils.errors import UserError

__all__ = ['report']

logger = logging.getLogger(__name__)

PAGE_FILE = 'report.html'
BUDGET = 16 * 2**20  # bytes of all pictures of a page


def report(folders: Sequence[str], *, out: str | None = None, png: str | None = None, count: int = 100) -> None:
    """Write a page about runs: what they learned, how fast, what they answer.

    Args:
        folders: work dirs; several are drawn over each other.
        out: the page; None: ``report.html`` in the first work dir, or no page where a ``png`` is asked for.
        png: a plain plot of the loss.
        count: how many questions of tests are shown, the worst first.

    Raises:
        UserError: a folder holds no run, a file cannot be written, or ``png`` has another ending.
    """
    if png is not None and Path(png).suffix.lower() != '.png':
        raise UserError(f'--png {png}: expected a name that ends in .png')
    runs = read_runs(folders)
    if png is not None:
        write_png(runs, Path(png))
        logger.info('loss of %d %s written to %s', len(runs), 'run' if len(runs) == 1 else 'runs', png)
    if png is not None and out is None:
        return
    path = Path(out) if out is not None else Path(folders[0], PAGE_FILE)
    page = as_page(runs, count=count, budget=BUDGET)
    try:
        path.write_text(page, encoding='utf-8')
    except OSError as error:
        raise UserError(f'--out {path}: cannot be written ({error.strerror})') from error
    logger.info('report of %d %s written to %s', len(runs), 'run' if len(runs) == 1 else 'runs', path)
