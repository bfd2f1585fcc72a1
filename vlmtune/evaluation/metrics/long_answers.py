"""Metrics of longer texts: transcripts, captions, translations."""

import re
from collections.abc import Sequence
from typing import Any

from vlmtune.evaluation.metrics.pairs import References, in_pairs
from vlmtune.utils.extras import need

# Scripts that write words without spaces between them, in which a character is the unit: kana, Han.
_UNSPACED = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'
_HAN = re.compile('[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]')
_TOKEN = re.compile(rf'[{_UNSPACED}]|[^\W_{_UNSPACED}]+')


def cer(predictions: Sequence[str], references: References) -> float:
    """Character error rate: edits per character of the references, as jiwer counts; 0 is perfect, above 1 possible.

    Of several references the one counts that needs the fewest edits per character.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package jiwer is missing.
    """
    return _error_rate('process_characters', predictions, references, what='the metric cer')


def wer(predictions: Sequence[str], references: References) -> float:
    """Word error rate: edits per word of the references, as jiwer counts; 0 is perfect, above 1 possible.

    Words are what white space parts, so that it says little about Chinese or Japanese: ``cer`` does.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package jiwer is missing.
    """
    return _error_rate('process_words', predictions, references, what='the metric wer')


def bleu(
    predictions: Sequence[str], references: References, *, tokenize: str | None = None, lowercase: bool = False
) -> float:
    """BLEU of the whole corpus by sacrebleu, in [0, 100].

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several.
        tokenize: sacrebleu's name of a tokenizer; None takes 'zh' where a reference has Chinese characters, else '13a'.
        lowercase: ignore case.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package sacrebleu is missing.
    """
    sacrebleu = need('sacrebleu', extra='metrics', what='the metric bleu')
    columns = _columns(predictions, references)
    if tokenize is None:
        chinese = any(_HAN.search(text) for column in columns for text in column if text)
        tokenize = 'zh' if chinese else '13a'
    # One sentence may be shorter than the longest n-grams; over a corpus there are some of every length.
    metric = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=len(predictions) == 1)
    return float(metric.corpus_score(predictions, columns).score)


def chrf(predictions: Sequence[str], references: References, *, word_order: int = 0) -> float:
    """chrF of the whole corpus by sacrebleu, in [0, 100]; it needs no words and so suits every language.

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several.
        word_order: 2 for chrF++.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package sacrebleu is missing.
    """
    sacrebleu = need('sacrebleu', extra='metrics', what='the metric chrf')
    metric = sacrebleu.CHRF(word_order=word_order)
    return float(metric.corpus_score(predictions, _columns(predictions, references)).score)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean F-measure of the longest common subsequence by rouge-score, in [0, 1].

    Of several references the best counts. Words are compared in lower case and not stemmed; Chinese and Japanese are
    compared character by character, where the tokenizer of rouge-score would drop all that is not ASCII.

    Raises:
        ValueError: the two differ in length, or are empty.
        ConfigError: the package rouge-score is missing.
    """
    scorers = need('rouge_score.rouge_scorer', extra='metrics', what='the metric rouge_l')
    scorer = scorers.RougeScorer(['rougeL'], tokenizer=_Tokenizer())
    scores = [
        scorer.score_multi(found, prediction)['rougeL'].fmeasure
        for prediction, found in in_pairs(predictions, references)
    ]
    return sum(scores) / len(scores)


class _Tokenizer:
    """Words in lower case; where no spaces part words, characters. For ASCII it is the one of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def _error_rate(process: str, predictions: Sequence[str], references: References, *, what: str) -> float:
    count = getattr(need('jiwer', extra='metrics', what=what), process)
    pairs = list(in_pairs(predictions, references))
    nearest = [
        found[0] if len(found) == 1 else min(found, key=lambda reference: _rate(count(reference, prediction)))
        for prediction, found in pairs
    ]
    return _rate(count(nearest, list(predictions)))


def _rate(counted: Any) -> float:
    """jiwer's own division, but 0 or 1 where all references are empty."""
    errors = counted.substitutions + counted.deletions + counted.insertions
    length = counted.hits + counted.substitutions + counted.deletions
    return errors / length if length else float(errors > 0)


def _columns(predictions: Sequence[str], references: References) -> list[list[str | None]]:
    """sacrebleu's form of references: the first of each prediction, then the second ones, None where there is none."""
    rows = [found for _, found in in_pairs(predictions, references)]
    return [[row[i] if i < len(row) else None for row in rows] for i in range(max(map(len, rows)))]
