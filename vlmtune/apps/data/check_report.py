"""The report of ``vlmtune check-data``, as a document and as tables."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmtune.apps.data.alternatives import Alternatives
from vlmtune.apps.data.crops import LOST
from vlmtune.apps.data.data_problems import ERROR_KINDS, KINDS, WARNING_KINDS, DataSetReport, Problem
from vlmtune.apps.data.held_out import HeldOut
from vlmtune.apps.data.token_checks import SAMPLED, TokenReport

_PLACES = 5  # named of each kind
_BAR = 40  # characters of the longest


@dataclass
class CheckReport:
    """Everything that was found.

    Attributes:
        config: as it was given.
        data_sets: one for each data set of the config.
        held_out: the rows of validation and test, where the config has some and its processor can be loaded.
        tokens: what an epoch costs.
        tokens_not_run: why tokens were not looked at.
        stops: why a run would stop before its first step, though bad rows are skipped.
    """

    config: str
    data_sets: list[DataSetReport]
    held_out: list[HeldOut] = field(default_factory=list)
    tokens: TokenReport | None = None
    tokens_not_run: str | None = None
    stops: str | None = None

    @property
    def has_errors(self) -> bool:
        """Whether something must be mended."""
        return self.errors > 0

    @property
    def errors(self) -> int:
        """Rows that must be mended, and data sets as a whole that a run would stop at."""
        stops = [self.stops, *(part.stops for part in self.held_out)]
        return self.count(ERROR_KINDS) + sum(reason is not None for reason in stops)

    @property
    def warnings(self) -> int:
        """What is not wrong but may not be meant."""
        return self.count(WARNING_KINDS) + (self.tokens is not None and self.tokens.crops is not None)

    def count(self, kinds: Any) -> int:
        """Problems of these kinds in all data sets."""
        return sum(data_set.count(kinds) for data_set in self.data_sets)


def as_dict(report: CheckReport) -> dict[str, Any]:
    """The report as plain data; it holds every problem."""
    return dict(
        config=report.config,
        ok=not report.has_errors,
        errors=report.errors,
        warnings=report.warnings,
        stops=report.stops,
        data_sets=[_data_set_as_dict(data_set) for data_set in report.data_sets],
        held_out=[asdict(part) for part in report.held_out],
        tokens=None if report.tokens is None else asdict(report.tokens),
        tokens_not_run=report.tokens_not_run,
    )


def _data_set_as_dict(data_set: DataSetReport) -> dict[str, Any]:
    by_kind = data_set.by_kind()
    return dict(
        name=data_set.name,
        rows=data_set.rows,
        images=data_set.images,
        counts={kind: len(problems) for kind, problems in by_kind.items()},
        problems=[asdict(problem) for problems in by_kind.values() for problem in problems],
    )


def as_text(report: CheckReport) -> str:
    """The report as tables; of every kind of problem, the number and the first places."""
    lines: list[str] = []
    for data_set in report.data_sets:
        lines += [*_data_set_lines(data_set), '']
    if report.tokens is not None:
        lines += [*_token_lines(report.tokens), '']
    if report.held_out:
        lines += [*map(_held_out_line, report.held_out), '']
    if report.tokens_not_run is not None:
        lines += [f'token checks were not run: {report.tokens_not_run}', '']
    if report.stops is not None:
        lines += [f'a run would stop: {report.stops}', '']
    return '\n'.join([*lines, f'{report.errors:,} errors, {report.warnings:,} warnings'])


def _data_set_lines(data_set: DataSetReport) -> Iterator[str]:
    yield f'{data_set.name}: {data_set.rows:,} rows, {data_set.images:,} images'
    for kind, problems in data_set.by_kind().items():
        word = 'warning' if kind in WARNING_KINDS else 'error'
        yield f'  {word + ":":<8} {len(problems):>9,} x {KINDS[kind]}'
        yield f'    {_places(problems)}'
        yield f'    {problems[0].where}: {problems[0].reason}'


def _places(problems: list[Problem]) -> str:
    more = ', ...' if len(problems) > _PLACES else ''
    return ', '.join(problem.where for problem in problems[:_PLACES]) + more


def _held_out_line(part: HeldOut) -> str:
    if part.stops is not None:
        return f'{part.name}: error: a run would stop: {part.stops}'
    return f'{part.name}: {part.rows:,} rows, {part.questions:,} questions, {part.bad:,} rows left out'


def _token_lines(tokens: TokenReport) -> Iterator[str]:
    about = 'about ' if tokens.samples > SAMPLED else ''
    yield (
        f'an epoch: {tokens.samples:,} samples, {tokens.tokens:,} tokens, {tokens.supervised:,} of them learned, '
        f'{about}{tokens.image_tokens:,} of images'
    )
    if tokens.crops is not None:
        yield (
            f'warning: {about}{tokens.crops.share:.0%} of the pictures lose more than {LOST:.0%} of their area to the '
            f'crop of the image processor; in processor, {tokens.crops.setting} shows them whole'
        )
    if tokens.truncated:
        yield f'{tokens.truncated:,} samples were shortened by whole turns to fit max_length'
    what = 'packs' if tokens.packed else 'batches'
    rest = 'left free' if tokens.packed else 'padding'
    yield f'{tokens.packs:,} {what}, {1 - tokens.density:.1%} of their tokens {rest}; {tokens.steps:,} optimizer steps'
    yield ''
    yield f'{"tokens":>15}{"samples":>12}'
    most = max(bar.samples for bar in tokens.histogram)
    for bar in tokens.histogram:
        length = -(-bar.samples * _BAR // most)
        yield f'{f"{bar.first:,} - {bar.last:,}":>15}{bar.samples:>12,}  {"#" * length}'.rstrip()
    for alternatives in tokens.alternatives:
        yield ''
        yield from _alternative_lines(alternatives, about=about, what=what)


def _alternative_lines(alternatives: Alternatives, *, about: str, what: str) -> Iterator[str]:
    yield f'{alternatives.setting:>20}{about + "tokens":>20}{"too long":>12}{what:>12}'
    for row in alternatives.values:
        now = '(now) ' if row.value == alternatives.now else ''
        yield f'{f"{now}{row.value:,}":>20}{row.tokens:>20,}{row.too_long:>12,}{row.packs:>12,}'
