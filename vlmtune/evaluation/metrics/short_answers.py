"""Metrics of short answers: right or wrong, or nearly right."""

import math
from collections.abc import Sequence

from vlmtune.evaluation.metrics.pairs import References, mean_of_best
from vlmtune.utils.extras import need


def exact_match(predictions: Sequence[str], references: References, *, ignore_case: bool = False) -> float:
    """Share of predictions that equal a reference, white space at the ends ignored; in [0, 1].

    Raises:
        ValueError: the two differ in length, or are empty.
    """

    def equal(prediction: str, reference: str) -> bool:
        one, other = prediction.strip(), reference.strip()
        return one == other or (ignore_case and one.casefold() == other.casefold())

    return mean_of_best(predictions, references, equal)


def relaxed_accuracy(predictions: Sequence[str], references: References, *, tolerance: float = 0.05) -> float:
    """Share of right answers about charts: numbers within a tolerance, other answers equal but for case; in [0, 1].

    The measure of ChartQA (arXiv 2203.10244, section 5.1). A number may end in ``%``, which divides it by 100; one
    with thousands separators or a unit is text, as in the common implementations.

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several.
        tolerance: of a number, as a share of the reference.

    Raises:
        ValueError: the two differ in length, or are empty.
    """

    def right(prediction: str, reference: str) -> bool:
        found, expected = _number(prediction), _number(reference)
        if found is None or not expected:  # nothing is near zero but zero
            return prediction.strip().lower() == reference.strip().lower() or (found == 0 and expected == 0)
        return abs(found - expected) <= tolerance * abs(expected)

    return mean_of_best(predictions, references, right)


def anls(predictions: Sequence[str], references: References, *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity, the measure of DocVQA (arXiv 1907.00490, equation 1); in [0, 1].

    Case and the amount of white space do not count.

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several.
        threshold: an answer whose normalised distance is this or more scores 0.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package rapidfuzz is missing.
    """
    levenshtein = need('rapidfuzz.distance.Levenshtein', extra='metrics', what='the metric anls')

    def similarity(prediction: str, reference: str) -> float:
        one, other = (' '.join(text.lower().split()) for text in (prediction, reference))
        distance = levenshtein.normalized_distance(one, other)
        return 1 - distance if distance < threshold else 0.0

    return mean_of_best(predictions, references, similarity)


def _number(text: str) -> float | None:
    """None for what is no finite number."""
    text = text.strip()
    try:
        number = float(text.removesuffix('%')) / (100 if text.endswith('%') else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
