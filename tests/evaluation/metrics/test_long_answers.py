import random

import jiwer
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from vlmtune.evaluation import bleu, cer, chrf, rouge_l, wer

WORDS = 'the cat sat on a mat, red & blue; it is 3.5 m'.split()


def texts(count, *, seed):
    draw = random.Random(seed)
    return [' '.join(draw.choices(WORDS, k=draw.randint(5, 9))) for _ in range(count)]


PREDICTIONS, REFERENCES, OTHERS = (texts(30, seed=seed) for seed in range(3))


def test_error_rates_are_those_of_jiwer():
    assert cer(PREDICTIONS, REFERENCES) == pytest.approx(jiwer.cer(REFERENCES, PREDICTIONS))
    assert wer(PREDICTIONS, REFERENCES) == pytest.approx(jiwer.wer(REFERENCES, PREDICTIONS))
    assert 0.3 < cer(PREDICTIONS, REFERENCES) < wer(PREDICTIONS, REFERENCES)


def test_error_rates_are_of_all_characters_and_not_a_mean_of_means():
    assert cer(['abcdefghij', 'x'], ['abcdefghij', 'y']) == pytest.approx(1 / 11)
    assert wer(['a b c d', 'x'], ['a b c d', 'y']) == pytest.approx(1 / 5)


def test_of_several_references_the_nearest_counts():
    assert cer(['abcd', 'x'], [['wxyz', 'abce'], ['x']]) == pytest.approx(1 / 5)
    assert wer(['a b', 'x'], [['c d e f', 'a c'], ['x']]) == pytest.approx(1 / 3)


def test_error_rates_of_empty_texts():
    assert cer([''], ['']) == 0
    assert cer(['abc'], ['']) == 1
    assert wer(['', 'a b'], ['a b', 'a b']) == 0.5


def test_chinese_is_counted_by_characters():
    assert cer(['今天天气很好'], ['今天天汽很好']) == pytest.approx(1 / 6)
    assert wer(['今天天气很好'], ['今天天汽很好']) == 1


def test_bleu_and_chrf_are_those_of_sacrebleu():
    columns = [REFERENCES, OTHERS]
    rows = list(zip(REFERENCES, OTHERS, strict=True))
    assert bleu(PREDICTIONS, rows) == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, columns).score)
    assert chrf(PREDICTIONS, rows) == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, columns).score)
    plus = sacrebleu.corpus_chrf(PREDICTIONS, columns, word_order=2).score
    assert chrf(PREDICTIONS, rows, word_order=2) == pytest.approx(plus)
    assert 5 < bleu(PREDICTIONS, rows) < 95
    loud = [text.upper() for text in PREDICTIONS]
    assert bleu(loud, rows, lowercase=True) == pytest.approx(bleu(PREDICTIONS, rows, lowercase=True))


def test_rows_may_have_unlike_numbers_of_references():
    rows = [[REFERENCES[0], OTHERS[0]], [REFERENCES[1]]]
    columns = [REFERENCES[:2], [OTHERS[0], None]]
    assert bleu(PREDICTIONS[:2], rows) == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS[:2], columns).score)


def test_one_short_sentence_scores_by_the_words_it_has():
    assert bleu(['red'], ['red']) == pytest.approx(100)
    sentence = sacrebleu.sentence_bleu(PREDICTIONS[0], [REFERENCES[0]]).score
    assert bleu(PREDICTIONS[:1], REFERENCES[:1]) == pytest.approx(sentence)


def test_bleu_of_chinese_is_of_characters():
    predictions, references = ['图片里有一只红色的猫'] * 2, ['图片里有一只黑色的猫'] * 2
    chinese = sacrebleu.corpus_bleu(predictions, [references], tokenize='zh').score
    assert bleu(predictions, references) == pytest.approx(chinese)
    assert chinese > 40 > bleu(predictions, references, tokenize='13a')


def test_rouge_l_is_that_of_rouge_score():
    scorer = RougeScorer(['rougeL'])
    rows = list(zip(REFERENCES, OTHERS, strict=True))
    theirs = [
        scorer.score_multi(row, prediction)['rougeL'].fmeasure
        for row, prediction in zip(rows, PREDICTIONS, strict=True)
    ]
    assert rouge_l(PREDICTIONS, rows) == pytest.approx(sum(theirs) / len(theirs))
    assert rouge_l(['A_b C-d 3.5!'], ['a b c d 3 5']) == 1


def test_rouge_l_of_chinese_is_of_characters_and_accents_stay():
    assert rouge_l(['一只红色的猫'], ['一只黑色的猫']) == pytest.approx(5 / 6)
    assert RougeScorer(['rougeL']).score('一只黑色的猫', '一只红色的猫')['rougeL'].fmeasure == 0
    assert rouge_l(['café über'], ['café uber']) == 0.5
