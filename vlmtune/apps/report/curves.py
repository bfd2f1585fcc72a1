"""Which plots a report has, and what is drawn in each."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmtune.apps.report.run_files import Result, Run, is_number
from vlmtune.apps.report.svg import FIRST_LAYER, Line, Point, areas, averaged, in_columns, plot
from vlmtune.engine.run_layout import NOT_METRICS

PHASES = ('data', 'vision', 'llm', 'optimizer')
_SHOWN = {
    'grad_norm': 'Gradient norm',
    'lr': 'Learning rate',
    'tokens_per_second': 'Tokens per second',
    'learned_tokens_per_second': 'Learned tokens per second',
    'memory_mib': 'Peak memory, GiB',
    'mfu': 'MFU',
    'tflops': 'TFLOP/s per device',
}
_EXACT = ('lr', 'memory_mib')  # they do not scatter
_DOTS = 500  # of a cloud of points
_ELSEWHERE = {'step', 'epoch', 'loss', 'samples', 'time', 'data_time_share', *(f'{phase}_time' for phase in PHASES)}


@dataclass(frozen=True)
class Plot:
    """A title, the drawing, and (class of the style sheet, name) of what the title does not tell."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def window_of(points: Sequence[Point]) -> int:
    """Steps that the thick line of a plot averages."""
    return max(1, min(100, len(points) // 20))


def training_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss, learning rate, speed, memory and all other scalars over the steps; run i has colour i."""
    plots = [*_loss_plots(runs)]
    others = {name for run in runs for row in run.steps for name in row} - _ELSEWHERE - {*_SHOWN}
    for name, title in (_SHOWN | {name: name for name in sorted(others)}).items():
        scale = 1024 if name == 'memory_mib' else 1
        lines: list[Line] = []
        for i, run in enumerate(runs):
            points = [(step, value / scale) for step, value in run.series(name)]
            lines += [Line(points, i)] if name in _EXACT else _smoothed(points, i)
        plots.append(Plot(title, plot(lines, label=title, zero=name in _SHOWN)))
    plots += _time_plots(runs)
    return [made for made in plots if made.svg]


def _loss_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    lines = [line for i, run in enumerate(runs) for line in _smoothed(run.series('loss'), i)]
    dots = [Line(points, i, 'dots') for i, run in enumerate(runs) if (points := run.validation_series('loss'))]
    legend = (('dots', 'validation'),) if dots else ()
    yield Plot('Loss', plot([*lines, *dots], label='loss', zero=True), legend)
    values = [y for line in lines for _, y in line.points if y > 0]
    if values and max(values) > 10 * min(values):
        yield Plot('Loss, logarithmic', plot([*lines, *dots], label='loss, logarithmic', log=True), legend)


def _smoothed(points: Sequence[Point], colour: int) -> list[Line]:
    window = window_of(points)
    if window == 1:
        return [Line(points, colour)]
    return [Line(points, colour, 'faint'), Line(averaged(points, window=window), colour)]


def _time_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    """Seconds of a step by phase, one plot per run."""
    for run in runs:
        rows = [
            row for row in run.steps if all(is_number(row.get(n)) for n in ('time', *(f'{p}_time' for p in PHASES)))
        ]
        layers = [in_columns([(row['step'], row[f'{phase}_time']) for row in rows]) for phase in PHASES]
        used = [(phase, layer) for phase, layer in zip(PHASES, layers, strict=True) if any(y > 0 for _, y in layer)]
        title = 'Seconds per step' + (f', {run.name}' if len(runs) > 1 else '')
        legend = tuple((f'c{FIRST_LAYER + i}', phase) for i, (phase, _) in enumerate(used))
        yield Plot(title, areas([layer for _, layer in used], label=title), legend)


def validation_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of what validations have measured."""
    return [*dict.fromkeys(n for run in runs for row in run.validations for n in row if n not in NOT_METRICS)]


def validation_plots(runs: Sequence[Run]) -> list[Plot]:
    """One plot per metric of the validations."""
    plots = []
    for name in validation_metrics(runs):
        lines = [Line(run.validation_series(name), i, 'dots') for i, run in enumerate(runs)]
        plots.append(Plot(name, plot(lines, label=f'validation: {name}')))
    return [made for made in plots if made.svg]


def cost_plots(results: Sequence[tuple[int, Result]]) -> list[Plot]:
    """What an answer costs against the size of its images; results come with their colours."""
    plots = []
    for name, title in (('seconds', 'Seconds per answer'), ('image_tokens', 'Image tokens')):
        lines = [
            Line(
                _thinned(sorted((megapixels(r), r[name]) for r in result.rows if is_number(r.get(name)))),
                colour,
                'scatter',
            )
            for colour, result in results
        ]
        if len({x for line in lines for x, _ in line.points}) > 1:
            plots.append(Plot(f'{title} by megapixels', plot(lines, label=f'{title} by megapixels', zero=True)))
    return [made for made in plots if made.svg]


def _thinned(points: Sequence[Point]) -> list[Point]:
    return list(points[:: -(-len(points) // _DOTS) or 1])


def megapixels(row: dict) -> float:
    """Of all images of a prediction."""
    return sum(w * h for w, h in row.get('image_sizes') or []) / 1e6


def median(points: Sequence[Point]) -> float | None:
    """Of the values."""
    return statistics.median(y for _, y in points) if points else None
