"""What metrics share: predictions and references in pairs."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

References: TypeAlias = Sequence[Sequence[str]] | Sequence[str]
"""The answers that are right, for each prediction one or several."""


def in_pairs(predictions: Sequence[str], references: References) -> Iterator[tuple[str, list[str]]]:
    """Each prediction with its references.

    Raises:
        ValueError: the two differ in length or are empty, or a prediction has no reference.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f'{len(predictions)} predictions for {len(references)} references')
    for i, (prediction, found) in enumerate(zip(predictions, references, strict=True)):
        if not found and not isinstance(found, str):
            raise ValueError(f'prediction {i} has no reference')
        yield prediction, [found] if isinstance(found, str) else list(found)


def mean_of_best(
    predictions: Sequence[str], references: References, score: Callable[[str, str], float | bool]
) -> float:
    """The mean over predictions of the score against the reference that fits best."""
    return statistics.fmean(
        max(score(prediction, reference) for reference in found)
        for prediction, found in in_pairs(predictions, references)
    )
