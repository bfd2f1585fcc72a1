"""Scores of generated answers against references."""

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, white space at the ends ignored; in [0, 1].

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f'{len(predictions)} predictions for {len(references)} references')
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)
