"""Answers as HTML: test results with failures first, and sample answers on the way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from vlmtune.apps.html.pictures import Pictures
from vlmtune.apps.html.words import chip, folded, text
from vlmtune.apps.report.differences import differences
from vlmtune.apps.report.run_files import Result, Row, Run, is_less_better, is_number
from vlmtune.utils.errors import DataError

_MARKS = {'extra': 'ins', 'missing': 'del'}


@dataclass(frozen=True)
class NamedResult:
    """A result with the name and the colour that it has in this report; ``is_last`` of its run's."""

    name: str
    colour: int
    result: Result
    is_last: bool = True


@dataclass(frozen=True)
class Card:
    """One question and the answers that were given to it.

    Attributes:
        row: the first answer's, for the question.
        answers: with the results that they are from.
        loss: 0 where the last answer of each run is right; the larger the worse.
    """

    row: Row
    answers: list[tuple[NamedResult, Row]]
    loss: float


def name_results(runs: Sequence[Run]) -> list[NamedResult]:
    """All results of all runs; names tell runs apart where there are several."""
    pairs = [(run, result) for run in runs for result in run.results]
    return [
        NamedResult(
            f'{run.name}: {result.name}' if len(runs) > 1 else result.name, colour, result, result is run.results[-1]
        )
        for colour, (run, result) in enumerate(pairs)
    ]


def main_metric(results: Sequence[NamedResult]) -> str:
    """The first score of the first row that has one, which answers are ordered by; '' where there is none."""
    rows = (row for one in results for row in one.result.rows)
    return next((name for row in rows for name, value in _scores(row).items() if is_number(value)), '')


def cards(results: Sequence[NamedResult], *, rules_from: Sequence[Mapping[str, Any]]) -> list[Card]:
    """Equal questions together, the worst first by the ``rules`` of those dicts; unscored ones keep their order."""
    metric = main_metric(results)
    grouped: dict[str, list[tuple[NamedResult, Row]]] = {}
    for one in results:
        for row in one.result.rows:
            key = json.dumps([row['index'], row.get('where'), row.get('question')])
            grouped.setdefault(key, []).append((one, row))
    values = [_scores(row).get(metric) for one in results for row in one.result.rows]
    is_less = is_less_better(metric, rules_from)
    best = _best([value for value in values if is_number(value)], is_less=is_less)
    made = []
    for pairs in grouped.values():
        losses = [_loss(row, metric, best) for one, row in pairs if one.is_last or not any(o.is_last for o, _ in pairs)]
        made.append(Card(pairs[0][1], pairs, mean(losses)))
    return sorted(made, key=lambda card: (-card.loss, card.row['index']))


def _scores(row: Row) -> dict[str, Any]:
    scores = row.get('scores')
    return scores if isinstance(scores, dict) else {}


def _best(values: Sequence[float], *, is_less: bool) -> float:
    """The value of a perfect answer: 0 of an error rate, else 1, or 100 where that is the scale."""
    if is_less:
        return 0.0
    return 100.0 if max(values, default=0) > 1 else 1.0


def _loss(row: Row, metric: str, best: float) -> float:
    """How far an answer is from a perfect one; of one that has no score, whether it differs from its references."""
    value = _scores(row).get(metric)
    if is_number(value):
        return abs(best - value)
    references = _texts(row.get('references'))
    return float(bool(references) and str(row.get('prediction', '')).strip() not in [r.strip() for r in references])


def card_html(card: Card, pictures: Pictures) -> str:
    """Pictures, question, references, and the answers with what is wrong in them."""
    row, references = card.row, _texts(card.row.get('references'))
    right = '<p class="label">reference</p>' + ''.join(f'<div class="text">{text(one)}</div>' for one in references)
    answers = ''.join(_answer(one, answer, references) for one, answer in card.answers)
    state = 'right' if card.loss <= 1e-9 else 'wrong'
    return (
        f'<article class="card {state}">{_figures(row, pictures)}<div><h3>{text(row.get("where", ""))}</h3>'
        f'<p class="label">question</p><div class="text">{text(row.get("question", ""))}</div>'
        f'{right if references else ""}{answers}</div></article>'
    )


def _answer(one: NamedResult, row: Row, references: Sequence[str]) -> str:
    facts = [f'{text(name)} {value:.3g}' for name, value in _scores(row).items() if is_number(value)]
    if is_number(row.get('output_tokens')) and is_number(row.get('seconds')):
        facts.append(f'{row["output_tokens"]:,} tokens in {row["seconds"]:.2f} s')
    facts += ['<b>cut off at max_new_tokens</b>'] if row.get('finish') == 'length' else []
    shown = ''.join(
        text(piece.text) if piece.kind == 'same' else f'<{(tag := _MARKS[piece.kind])}>{text(piece.text)}</{tag}>'
        for piece in differences(str(row.get('prediction', '')), references)
    )
    return (
        f'<p class="label">{chip(one.name, one.colour)} <span class="facts">{", ".join(facts)}</span></p>'
        f'<div class="text">{shown}</div>'
    )


def _figures(row: Row, pictures: Pictures) -> str:
    made, sizes = [], row.get('image_sizes')
    for i, path in enumerate(_texts(row.get('images'))):
        size = sizes[i] if isinstance(sizes, list) and i < len(sizes) else None
        caption = text(pictures.name(path)) + (
            f', {text(size[0])} x {text(size[1])}' if isinstance(size, list) and size[1:] else ''
        )
        try:
            inside = f'<img src="{pictures.source(path)}" alt="">'
        except DataError as error:
            inside = f'<p class="trouble">{text(error)}</p>'
        made.append(f'<figure>{inside}<figcaption>{caption}</figcaption></figure>')
    return f'<div class="pictures">{"".join(made)}</div>' if made else ''


def _texts(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


# ---- sample answers


def chat_html(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """One card per question: what each run answered before and after, and on the way."""
    grouped: dict[str, list[tuple[int, Run, Row]]] = {}
    for i, run in enumerate(runs):
        for row in run.chats:
            grouped.setdefault(json.dumps([row.get('input'), row.get('images')]), []).append((i, run, row))
    return [_chat_card(rows, pictures) for rows in grouped.values()]


def _chat_card(rows: Sequence[tuple[int, Run, Row]], pictures: Pictures) -> str:
    question, shown = rows[0][2], []
    for colour, run in {i: run for i, run, _ in rows}.items():
        own = [row for i, _, row in rows if i == colour]
        name = f'{chip(run.name, colour)} ' if len({i for i, _, _ in rows}) > 1 else ''
        shown += [_said(own[0], name), *([_said(own[-1], name)] if len(own) > 1 else [])]
        if between := own[1:-1]:
            shown.append(folded(f'{name}{len(between)} on the way', ''.join(_said(row, '') for row in between)))
    return (
        f'<article class="card">{_figures(question, pictures)}<div><p class="label">question</p>'
        f'<div class="text">{text(question.get("input", ""))}</div>{"".join(shown)}</div></article>'
    )


def _said(row: Row, name: str) -> str:
    said = f'<div class="text">{text(row.get("answer", ""))}</div>'
    return f'<p class="label">{name}after {row["iteration"]:,} steps</p>{said}'
