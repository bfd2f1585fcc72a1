import random

import pytest
from anls import anls_score

from vlmtune.evaluation import anls, exact_match, relaxed_accuracy


def test_exact_match_is_the_share_of_equal_answers():
    assert exact_match(['red', ' blue\n', 'Red', ''], ['red', 'blue', 'red', 'x']) == 0.5
    assert exact_match(['red', 'Red', ''], [['blue', 'red'], ['blue', 'red'], ['']]) == 2 / 3
    assert exact_match(['Straße', 'red'], [['STRASSE'], ['Red ']], ignore_case=True) == 1


@pytest.mark.parametrize('metric', [exact_match, anls, relaxed_accuracy])
@pytest.mark.parametrize(('predictions', 'references'), [([], []), (['a'], ['a', 'b'])])
def test_unequal_or_empty_lists_are_refused(metric, predictions, references):
    with pytest.raises(ValueError, match='predictions for'):
        metric(predictions, references)


def test_a_prediction_without_a_reference_is_refused():
    with pytest.raises(ValueError, match='prediction 1 has no reference'):
        exact_match(['a', 'b'], [['a'], []])


def test_anls_is_that_of_the_package():
    draw = random.Random(0)
    texts = [''.join(draw.choices('aAü字 ', k=draw.randint(0, 6))) for _ in range(60)]
    several = [draw.choices(texts, k=draw.randint(1, 3)) for _ in texts]
    for threshold in (0.5, 0.7):
        ours = [anls([text], [found], threshold=threshold) for text, found in zip(texts, several, strict=True)]
        theirs = [anls_score(text, found, threshold) for text, found in zip(texts, several, strict=True)]
        assert ours == pytest.approx(theirs)
        assert anls(texts, several, threshold=threshold) == pytest.approx(sum(theirs) / len(theirs))
    assert 0.1 < anls(texts, several) < 0.9


# The first eight rows, and their mean, are those of the test of google-research/pix2struct (relaxed_accuracy: 62.5).
PIX2STRUCT = [
    ('abc', 'abc', True),
    ('abc', 'Abc', True),
    ('Abc', 'abc', True),
    ('100%', '96%', True),
    ('100%', '94%', False),
    ('100%', '0.96', True),
    ('100%', '0.94', False),
    ("Don't", "Won't", False),
]
MORE = [
    ('105', '100', True),
    ('105.1', '100', False),
    ('-95', '-100', True),
    ('95', '-100', False),
    ('0.0', '0', True),
    ('0.001', '0', False),
    (' 7\n', '7', True),
    ('1,234', '1234', False),
    ('nan', 'nan', True),
    ('inf', '7', False),
]


@pytest.mark.parametrize(('prediction', 'reference', 'right'), PIX2STRUCT + MORE)
def test_relaxed_accuracy_lets_numbers_miss_by_five_percent(prediction, reference, right):
    assert relaxed_accuracy([prediction], [reference]) == right


def test_relaxed_accuracy_of_several_rows_references_and_tolerances():
    predictions, references, _ = zip(*PIX2STRUCT, strict=True)
    assert relaxed_accuracy(predictions, references) == 0.625
    assert relaxed_accuracy(['20'], [['no', '20.5']]) == 1
    assert relaxed_accuracy(['110'], ['100'], tolerance=0.1) == 1
