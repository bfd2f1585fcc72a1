"""The page of ``vlmtune report``: one file, no script, nothing fetched."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from vlmtune.apps.html.pictures import Pictures
from vlmtune.apps.html.words import chip, folded, page, table, text
from vlmtune.apps.report.answers import NamedResult, card_html, cards, chat_html, main_metric, name_results
from vlmtune.apps.report.curves import (
    Plot,
    cost_plots,
    median,
    training_plots,
    validation_metrics,
    validation_plots,
    window_of,
)
from vlmtune.apps.report.run_files import Run, image_folders, is_less_better, is_number, settings_of
from vlmtune.apps.report.style import STYLE
from vlmtune.apps.report.svg import compact

_ONLY_FAILURES = '<input type="checkbox" id="only"><label for="only">hide what is answered perfectly</label>'


def as_page(runs: Sequence[Run], *, count: int, budget: int) -> str:
    """The page.

    Args:
        runs: one or several, drawn over each other.
        count: at most this many questions of tests are shown.
        budget: bytes of all pictures together.
    """
    pictures = Pictures([folder for run in runs for folder in image_folders(run.config)], budget=budget)
    made = [(title, inside) for title, inside in _sections(runs, pictures, count=count) if inside]
    title = ', '.join(run.name for run in runs)
    links = ' '.join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in made)
    body = '\n'.join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{inside}</section>' for name, inside in made)
    return page(f'<nav>{links}</nav>\n{body}', title=title, style=STYLE)


def _anchor(name: str) -> str:
    return name.lower().replace(' ', '-')


def _sections(runs: Sequence[Run], pictures: Pictures, *, count: int) -> Iterator[tuple[str, str]]:
    results = name_results(runs)
    yield 'Overview', _overview(runs)
    yield 'Training', _training(runs)
    yield 'Validation', _plots(validation_plots(runs))
    yield 'Sample answers', ''.join(chat_html(runs, pictures))
    yield 'Tests', _tests(results)
    rules_from = [*(row for run in runs for row in run.validations), *(one.result.summary for one in results)]
    yield 'Answers', _answers(results, pictures, count=count, rules_from=rules_from)
    yield 'Parts', ''.join(_parts(run, several=len(runs) > 1) for run in runs)
    yield 'Config', _configs(runs)


def _chips(runs: Sequence[Run]) -> str:
    return f'<p class="legend">{"".join(chip(run.name, i) for i, run in enumerate(runs))}</p>' if len(runs) > 1 else ''


def _plots(plots: Sequence[Plot], legend: str = '') -> str:
    if not plots:
        return ''
    figures = ''.join(
        f'<figure><figcaption><b>{text(one.title)}</b>{"".join(chip(name, kind) for kind, name in one.legend)}'
        f'</figcaption>{one.svg}</figure>'
        for one in plots
    )
    return f'{legend}<div class="plots">{figures}</div>'


# ---- what came of it


def _overview(runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    names = [*dict.fromkeys(name for one in facts for name in one)]
    rows = [[text(name), *(text(one.get(name, '')) for one in facts)] for name in names]
    notes = [f'{run.name}: {note}' if len(runs) > 1 else note for run in runs for note in run.notes]
    told = ''.join(f'<p class="trouble">{text(note)}</p>' for note in notes)
    return table(['', *(chip(run.name, i) for i, run in enumerate(runs))], rows) + told


def _facts(run: Run) -> dict[str, str]:
    """What a run came to, in the order in which it is asked for; what is not known is left out."""
    losses, facts = run.series('loss'), {}
    if run.steps:
        facts['optimizer steps'] = f'{run.steps[-1]["step"]:,}'
        facts['samples'] = f'{sum(value for _, value in run.series("samples")):,.0f}'
    if losses:
        last = [value for _, value in losses[-window_of(losses) :]]
        facts['loss at the end'] = f'{mean(last):.4g}' + (f' (mean of {len(last)} steps)' if len(last) > 1 else '')
    for name in validation_metrics([run]):
        if points := run.validation_series(name):
            at, best = (min if is_less_better(name, run.validations) else max)(points, key=lambda p: p[1])
            facts[f'best validation {name}'] = f'{best:.4g} at step {at:,}'
    facts |= _speed(run)
    if run.starts > 1:
        facts['started'] = f'{run.starts} times'
    return facts


def _speed(run: Run) -> dict[str, str]:
    facts, seconds = {}, sum(value for _, value in run.series('time'))
    if seconds:
        facts['time in steps'] = str(datetime.timedelta(seconds=round(seconds)))
        facts['of it waiting for data'] = f'{sum(value for _, value in run.series("data_time")) / seconds:.1%}'
    for name, title in (('tokens_per_second', 'tokens/s'), ('learned_tokens_per_second', 'learned tokens/s')):
        if (value := median(run.series(name))) is not None:
            facts[f'{title}, median'] = f'{value:,.0f}'
    if (mfu := median(run.series('mfu'))) is not None:
        facts['MFU, median'] = f'{mfu:.1%}'
    if memory := run.series('memory_mib'):
        facts['peak memory'] = f'{max(value for _, value in memory) / 1024:.2f} GiB'
    return facts


def _training(runs: Sequence[Run]) -> str:
    window = max(window_of(run.series('loss')) for run in runs)
    note = f'<p class="facts">Thick lines are means of up to {window} steps.</p>' if window > 1 else ''
    return _plots(training_plots(runs), _chips(runs) + note)


# ---- tests and answers


def _tests(results: Sequence[NamedResult]) -> str:
    """Scores beside each other, and what answers cost by the size of the images."""
    tested = [one for one in results if one.result.summary]
    scores = [_scores(one.result.summary) for one in tested]
    names = [*dict.fromkeys(name for one in scores for name in one)]
    rows = [[text(name), *(_cell(one.get(name)) for one in scores)] for name in names]
    parts = [table(['', *(chip(one.name, one.colour) for one in tested)], rows)] if rows else []
    for one in tested:
        for key, value in one.result.summary.items():
            if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
                parts.append(_records(value, label=f'{chip(one.name, one.colour)} {text(key.replace("_", " "))}'))
    plots = cost_plots([(one.colour, one.result) for one in results])
    legend = ''.join(chip(one.name, one.colour) for one in results)
    return ''.join(parts) + _plots(plots, f'<p class="legend">{legend}</p>')


def _scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a ``metrics.json``, then how many samples there were and the like."""
    metrics = summary.get('metrics')
    found = {**(metrics if isinstance(metrics, Mapping) else {}), **summary}
    return {name: value for name, value in found.items() if is_number(value)}


def _records(rows: Sequence[Mapping[str, Any]], *, label: str) -> str:
    names = [*dict.fromkeys(name for row in rows for name in row)]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return table([text(name.replace('_', ' ')) for name in names], cells, label=label)


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}'
    return compact(value) if is_number(value) else text('' if value is None else value)


def _answers(
    results: Sequence[NamedResult], pictures: Pictures, *, count: int, rules_from: Sequence[Mapping[str, Any]]
) -> str:
    if not results:
        return ''
    found, metric = cards(results, rules_from=rules_from), main_metric(results)
    right = sum(card.loss <= 1e-9 for card in found)
    last = f' by {text(results[-1].name)}' if len(results) > 1 and sum(one.is_last for one in results) == 1 else ''
    shown = f'{count:,} of them, the worst first' if len(found) > count else 'the worst first'
    by = f' ({text(metric)})' if metric else ''
    told = (
        f'<p>{len(found):,} questions, {len(found) - right:,} not answered perfectly{last}{by}; {shown}. '
        'In an answer <ins>this is not in the reference</ins> and <del>this is missing</del>.</p>'
    )
    return told + _ONLY_FAILURES + ''.join(card_html(card, pictures) for card in found[:count])


# ---- what it was


def _parts(run: Run, *, several: bool) -> str:
    return _records(run.parts, label=text(run.name) if several else '') if run.parts else ''


def _configs(runs: Sequence[Run]) -> str:
    settings = [settings_of(run.config) for run in runs]
    names = [*dict.fromkeys(name for one in settings for name in one)]
    differ = [name for name in names if len({one.get(name) for one in settings}) > 1]
    rows = [[text(name), *(text(one.get(name, '')) for one in settings)] for name in differ]
    head = ['differs', *(chip(run.name, i) for i, run in enumerate(runs))]
    whole = [
        folded(f'config of {text(run.name)}', f'<pre class="scroll">{text(run.config)}</pre>')
        for run in runs
        if run.config
    ]
    return (table(head, rows) if rows else '') + ''.join(whole)
