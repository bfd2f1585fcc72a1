"""``--png``: the loss of runs as a picture, for a slide or a message."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlmtune.apps.report.curves import window_of
from vlmtune.apps.report.run_files import Run
from vlmtune.apps.report.svg import averaged
from vlmtune.utils.errors import UserError


def write_png(runs: Sequence[Run], path: Path) -> None:
    """Loss over steps: the steps faint, their running mean, validations as dots.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    if not any(run.series('loss') or run.validation_series('loss') for run in runs):
        raise UserError('--png: no loss has been written in these runs')
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        points, validation, colour = run.series('loss'), run.validation_series('loss'), f'C{i % 10}'
        window = window_of(points)
        if window > 1:
            axes.plot(*_columns(points), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*_columns(averaged(points, window=window)), color=colour, label=_plain(run.name))
        if validation:
            axes.plot(*_columns(validation), 'o--', color=colour, markersize=4, label=_plain(f'{run.name}, validation'))
    axes.set_xlabel('optimizer step')
    axes.set_ylabel('loss')
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format='png', dpi=150)
    except OSError as error:
        raise UserError(f'--png {path}: cannot be written ({error.strerror})') from error


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain(name: str) -> str:
    """A label that is no formula, and that is shown though it begins with an underscore."""
    return '\u200b' + name.encode('utf-8', 'replace').decode('utf-8').replace('$', r'\$')
