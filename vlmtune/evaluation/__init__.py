"""Looking at answers: generation in batches, metrics."""

from vlmtune.evaluation.evaluator import Evaluator
from vlmtune.evaluation.generation import generate, stop_tokens
from vlmtune.evaluation.metrics import (
    anls,
    bleu,
    box_iou,
    cer,
    chrf,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
    rouge_l,
    vqa_accuracy,
    wer,
)
from vlmtune.evaluation.prediction import predict
from vlmtune.evaluation.questions import Question, Questions, open_questions

__all__ = [
    'Evaluator',
    'Question',
    'Questions',
    'anls',
    'bleu',
    'box_iou',
    'cer',
    'chrf',
    'exact_match',
    'generate',
    'multiple_choice',
    'open_questions',
    'predict',
    'relaxed_accuracy',
    'rouge_l',
    'stop_tokens',
    'vqa_accuracy',
    'wer',
]
