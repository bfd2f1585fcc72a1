"""Scores of generated answers against references.

A metric is a function ``metric(predictions, references, **options)``: texts, for each one or several texts that are
right, and a number or ``{name: number}``. A keyword argument named ``samples`` gets the prediction rows, one named
``processor`` the model's processor.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from vlmtune.evaluation.metrics.boxes import box_iou
from vlmtune.evaluation.metrics.choices import multiple_choice
from vlmtune.evaluation.metrics.long_answers import bleu, cer, chrf, rouge_l, wer
from vlmtune.evaluation.metrics.short_answers import anls, exact_match, relaxed_accuracy
from vlmtune.evaluation.metrics.vqa import vqa_accuracy

METRICS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        metric.__name__: metric
        for metric in (
            exact_match,
            vqa_accuracy,
            anls,
            relaxed_accuracy,
            cer,
            wer,
            bleu,
            chrf,
            rouge_l,
            multiple_choice,
            box_iou,
        )
    }
)
"""The built-in metrics by name."""

PACKAGES: Mapping[str, str] = MappingProxyType(
    dict(
        anls='rapidfuzz',
        cer='jiwer',
        wer='jiwer',
        bleu='sacrebleu',
        chrf='sacrebleu',
        rouge_l='rouge_score.rouge_scorer',
    )
)
"""{metric: the module that it needs}; all come with the extra ``metrics``."""

LESS_IS_BETTER = frozenset({'cer', 'wer'})
"""The built-in metrics that count errors."""

__all__ = [
    'LESS_IS_BETTER',
    'METRICS',
    'PACKAGES',
    'anls',
    'bleu',
    'box_iou',
    'cer',
    'chrf',
    'exact_match',
    'multiple_choice',
    'relaxed_accuracy',
    'rouge_l',
    'vqa_accuracy',
    'wer',
]
