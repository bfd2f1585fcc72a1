"""What is asked of the answers to a data set: which metrics, how they are generated, what is right."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmengine.config.lazy import LazyObject
from transformers import GenerationConfig

from vlmtune.evaluation.metrics import METRICS, PACKAGES
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.extras import need
from vlmtune.utils.suggest import did_you_mean

_LESS = ('loss', 'cer', 'wer', 'perplexity')
_SUPPLIED = ('samples', 'processor')


@dataclass(frozen=True)
class _Metric:
    name: str
    function: Callable[..., Any]
    options: dict[str, Any]
    supplied: tuple[str, ...]


class Evaluator:
    """Scores of prediction rows.

    Args:
        metrics: each ``dict(type=function, **options)``, a function, or the name of a built-in one. ``name=`` calls its
            score otherwise, so that one function can stand there twice.
        generation: settings of transformers' ``generate``, for example ``dict(max_new_tokens=64)``.
        reference_key: the key of a row that holds what is right, a text or a list of texts; None: the last answer.
        processor: of the model; for metrics with an argument of that name.

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
    ) -> None:
        if isinstance(metrics, str | Mapping) or callable(metrics):
            metrics = [metrics]
        self.metrics = [_metric(given, where=f'metrics[{i}]') for i, given in enumerate(metrics)]
        names = [metric.name for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f'metrics: two are called {twice[0]!r}; give one of them a name="..." of its own')
        self.generation = dict(generation or {})
        check_generation(self.generation, where='generation')
        self.reference_key = reference_key
        self.processor = processor

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The scores of all rows that have references; rows without are left out.

        Args:
            rows: as in predictions.jsonl; read are ``prediction``, ``references``, and whatever the metrics look at.

        Raises:
            ConfigError: there are metrics and no row has a reference, or a metric does not give a number.
        """
        if not self.metrics:
            return {}
        scored = [row for row in rows if row['references']]
        if not scored:
            key = 'an answer in its last turn' if self.reference_key is None else f'the key {self.reference_key!r}'
            raise ConfigError(
                f'metrics: none of {len(rows)} rows has {key} to compare with; '
                'set reference_key to the key that holds what is right, or remove the metrics'
            )
        found: dict[str, float] = {}
        for metric in self.metrics:
            for name, value in self._call(metric, scored).items():
                if name in found:
                    raise ConfigError(f'metrics: two give a score {name!r}; give one of them a name="..." of its own')
                found[name] = value
        return found

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What ``scores`` would be for this row alone; empty where it has no references."""
        return self.scores([row]) if row['references'] else {}

    def _call(self, metric: _Metric, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Named by the metric; several numbers of one metric by their own names, behind its ``name=`` if it has one."""
        supplied = dict(samples=rows, processor=self.processor)
        options = metric.options | {name: supplied[name] for name in metric.supplied}
        predictions = [str(row['prediction']) for row in rows]
        value = metric.function(predictions, [list(row['references']) for row in rows], **options)
        if not isinstance(value, Mapping):
            return {metric.name: _number(value, metric.name)}
        lead = '' if metric.name == metric.function.__name__ else f'{metric.name}_'
        return {f'{lead}{name}': _number(number, f'{metric.name}: {name}') for name, number in value.items()}


def check_generation(settings: Mapping[str, Any], *, where: str) -> None:
    """Whether transformers' ``generate`` knows these settings.

    Args:
        settings: by name; ``stop_strings`` is one of them.
        where: they stand, for the message.

    Raises:
        ConfigError: it does not, or a value cannot be.
    """
    known = {name for name in GenerationConfig().to_dict() if not name.startswith('_')}
    for name in settings:
        if name not in known:
            raise ConfigError(f'{where}: generate() has no setting {name!r}{did_you_mean(name, known)}')
    try:
        GenerationConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'{where}: {" ".join(str(error).split())}') from error


def is_better(name: str) -> Literal['greater', 'less']:
    """Which of two values of a score is the better one, by its name: ``'val/cer'`` -> ``'less'``."""
    last = name.rpartition('/')[2]
    return 'less' if any(last == less or last.endswith(f'_{less}') for less in _LESS) else 'greater'


def _metric(given: Mapping[str, Any] | Callable[..., Any] | str, *, where: str) -> _Metric:
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else dict(type=given)
    function, name = _function(options.pop('type', None), where=where), options.pop('name', None)
    own = getattr(function, '__name__', type(function).__name__)
    if METRICS.get(own) is function and own in PACKAGES:
        need(PACKAGES[own], extra='metrics', what=f'the metric {own}')
    parameters = inspect.signature(function).parameters
    supplied = tuple(word for word in _SUPPLIED if word in parameters and word not in options)
    try:
        inspect.signature(function).bind([], [], **options, **dict.fromkeys(supplied))
    except TypeError as error:
        raise ConfigError(f'{where}: {own}(predictions, references, ...) cannot be called: {error}') from error
    return _Metric(str(name or own), function, options, supplied)


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


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'the metric {name} returned {value!r}; expected a number, or a dict of numbers') from error
    if not math.isfinite(number):
        raise ConfigError(f'the metric {name} returned {number}; expected a finite number')
    return number
