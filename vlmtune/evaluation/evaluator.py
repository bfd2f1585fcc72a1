"""What is asked of the answers to a data set: which metrics, how they are generated, what is right."""

import inspect
import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mmengine.config.lazy import LazyObject

from vlmtune.evaluation.generation import check_generation
from vlmtune.evaluation.metrics import LESS_IS_BETTER, METRICS, PACKAGES
from vlmtune.utils.errors import ConfigError, UserError
from vlmtune.utils.extras import need
from vlmtune.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)

Rule: TypeAlias = Literal['greater', 'less']
"""Which of two values of a score is the better one."""

_SUPPLIED = ('samples', 'processor')


@dataclass(frozen=True)
class _Metric:
    name: str
    function: Callable[..., Any]
    options: dict[str, Any]
    supplied: tuple[str, ...]
    rule: Rule | None

    @property
    def lead(self) -> str:
        """What the names of its scores begin with, where it gives several."""
        return '' if self.name == getattr(self.function, '__name__', None) else f'{self.name}_'

    @property
    def is_one_number(self) -> bool:
        """Whether it says that it returns one number; if not, it may name its scores itself."""
        return inspect.signature(self.function).return_annotation is float


class Evaluator:
    """Scores of prediction rows.

    Args:
        metrics: each ``dict(type=function, **options)``, a function, or the name of a built-in one. ``name=`` calls its
            score otherwise, so that one function can stand there twice; ``rule='less'`` or ``'greater'`` says which
            value of a function of your own is the better one.
        generation: settings of transformers' ``generate``, for example ``dict(max_new_tokens=64)``.
        reference_key: the key of a row that holds what is right, a text or a list of texts; None: the last answer.
        processor: of the model; for metrics with an argument of that name.
        at: the key of the config under which all this stands, for messages.

    Raises:
        ConfigError: a metric is none, its package is missing, two have one name, or ``generate`` has no such setting.
    """

    def __init__(
        self,
        metrics: Sequence[Mapping[str, Any] | Callable[..., Any] | str] = (),
        generation: Mapping[str, Any] | None = None,
        reference_key: str | None = None,
        *,
        processor: Any = None,
        at: str = '',
    ) -> None:
        self._at = at and f'{at}.'
        if isinstance(metrics, str | Mapping) or callable(metrics):
            metrics = [metrics]
        self.metrics = [_metric(given, where=f'{self._at}metrics[{i}]') for i, given in enumerate(metrics)]
        names = [metric.name for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f'{self._at}metrics: two are called {twice[0]!r}; give one of them a name="..." of its own'
            )
        self.generation = dict(generation or {})
        check_generation(self.generation, where=f'{self._at}generation')
        self.reference_key = reference_key
        self.processor = processor

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The scores of all rows that have references; rows without are left out.

        Args:
            rows: as in predictions.jsonl; read are ``prediction``, ``references``, and whatever the metrics look at.

        Raises:
            ConfigError: there are metrics and no row has a reference, or a metric gives no number.
        """
        if not self.metrics:
            return {}
        scored = [row for row in rows if row['references']]
        if not scored:
            raise self._nothing_to_compare(len(rows))
        found: dict[str, float] = {}
        for metric in self.metrics:
            scores = self._call(metric, scored)
            if not scores:
                raise ConfigError(f'the metric {metric.name} found nothing to score in any of {len(scored)} rows')
            for name, value in scores.items():
                if name in found:
                    raise ConfigError(
                        f'{self._at}metrics: two give a score {name!r}; give one of them a name="..." of its own'
                    )
                found[name] = _number(value, f'{metric.name}: {name}' if name != metric.name else name)
        return found

    def check_references(self, references: Sequence[Sequence[str]]) -> None:
        """Tell, better before anything is asked, of how many rows the answers cannot be compared with anything.

        Args:
            references: of each row.

        Raises:
            ConfigError: there are metrics, and no row has a reference.
        """
        left_out = sum(not found for found in references)
        if not self.metrics or not left_out:
            return
        if left_out == len(references):
            raise self._nothing_to_compare(len(references))
        logger.warning(
            '%d of %d rows have no reference: they are asked, and left out of the scores', left_out, len(references)
        )

    def _nothing_to_compare(self, count: int) -> ConfigError:
        key = 'an answer in its last turn' if self.reference_key is None else f'the key {self.reference_key!r}'
        return ConfigError(
            f'{self._at}metrics: none of {count} rows has {key} to compare with; '
            'set reference_key to the key that holds what is right, or remove the metrics'
        )

    def rule_of(self, name: str) -> Rule | None:
        """Which of two values of a score is the better one: built-in metrics know, others have a ``rule``, or none."""
        if name == 'loss':
            return 'less'
        rules = {metric.rule for metric in self.metrics if metric.name == name} or {
            metric.rule for metric in self.metrics if not metric.is_one_number and name.startswith(metric.lead)
        }
        return rules.pop() if len(rules) == 1 else None

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What ``scores`` would be for this row alone, where that is a number; empty without references."""
        found: dict[str, float] = {}
        for metric in self.metrics if row['references'] else ():
            with suppress(UserError):  # a correlation, say, needs several rows
                for name, value in self._call(metric, [row]).items():
                    with suppress(UserError):
                        found[name] = _number(value, name)
        return found

    def _call(self, metric: _Metric, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Named by the metric; several numbers of one metric by their own names, behind its ``name=`` if it has one."""
        supplied = dict(samples=rows, processor=self.processor)
        options = metric.options | {name: supplied[name] for name in metric.supplied}
        predictions = [str(row['prediction']) for row in rows]
        references = [list(row['references']) for row in rows]
        try:
            value = metric.function(predictions, references, **options)
        except UserError:
            raise
        except Exception as error:  # it may be the user's own
            raise ConfigError(f'the metric {metric.name} failed: {_in_words(error)}') from error
        if not isinstance(value, Mapping):
            return {metric.name: value}
        return {f'{metric.lead}{name}': number for name, number in value.items()}


def _metric(given: Mapping[str, Any] | Callable[..., Any] | str, *, where: str) -> _Metric:
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else dict(type=given)
    function, name = _function(options.pop('type', None), where=where), options.pop('name', None)
    own = getattr(function, '__name__', type(function).__name__)
    rule, built_in = options.pop('rule', None), METRICS.get(own) is function
    if rule not in (None, *get_args(Rule)):
        raise ConfigError(f"{where}: rule={rule!r} is unknown; expected 'greater' or 'less'")
    if built_in and own in PACKAGES:
        need(PACKAGES[own], extra='metrics', what=f'the metric {own}')
    if built_in and rule is None:
        rule = 'less' if own in LESS_IS_BETTER else 'greater'
    parameters = inspect.signature(function).parameters
    supplied = tuple(word for word in _SUPPLIED if word in parameters and word not in options)
    try:
        inspect.signature(function).bind([], [], **options, **dict.fromkeys(supplied))
    except TypeError as error:
        raise ConfigError(f'{where}: {own}(predictions, references, ...) cannot be called: {error}') from error
    return _Metric(str(name or own), function, options, supplied, rule)


def _function(given: Any, *, where: str) -> Callable[..., Any]:
    function = given.build() if isinstance(given, LazyObject) else given
    if isinstance(function, str):
        if function not in METRICS:
            raise ConfigError(
                f'{where}: no built-in metric is called {function!r}{did_you_mean(function, METRICS)}; '
                f'there are {", ".join(METRICS)}, and functions of your own by type=function'
            )
        function = METRICS[function]
    if not callable(function):
        raise ConfigError(f'{where}: expected dict(type=<function>, ...), got type={function!r}')
    return function


def _in_words(error: Exception) -> str:
    """What went wrong, and the line where: ``KeyError: 'boxes' (own_metrics.py:12)``."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = ' '.join(f'{type(error).__name__}: {error}'.split())
    return f'{said} ({Path(last.filename).name}:{last.lineno})'


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'the metric {name} returned {value!r}; expected a number, or a dict of numbers') from error
    if not math.isfinite(number):
        raise ConfigError(f'the metric {name} returned {number}; expected a finite number')
    return number
