import pytest

from vlmtune.evaluation import vqa_accuracy

# Run through vqaEval.py of github.com/GT-Vision-Lab/VQA, commit-independent: the values are what it printed.
OFFICIAL = [
    ('Two', ['2'] * 4 + ['two'] * 2 + ['3'] * 4, 1.0),
    ('red', 'red|red|Red and white|red|white|red/white|white|pink|red-white|maroon'.split('|'), 0.9),
    ('the red.', 'red|a red|white|white|white|blue|pink|grey|green|tan'.split('|'), 0.6),
    ('dont know', "don't know|dont know|yes|yes|yes|yes|yes|no|no|no".split('|'), 0.6),
    ("somebody'd", "somebodyd|somebody'd|yes|yes|yes|yes|yes|no|no|no".split('|'), 0.6),
    ('1,000', ['1000', '1,000', '1000'] + ['100'] * 7, 0.9),
    ('1.5', ['1.5', '1.5.'] + ['15'] * 8, 0.6),
    ('ice-cream', ['ice cream'] * 3 + ['icecream'] * 7, 0.9),
    ('Yes', ['yes'] * 10, 0.0),
    ('yes', ['yes'] * 10, 1.0),
    ('yes.', ['yes'] * 10, 0.0),
    ('none', ['0'] + ['1'] * 9, 0.3),
    ('tomorrow', ['today'] * 5 + ['now'] * 5, 0.0),
]


@pytest.mark.parametrize(('answer', 'people', 'score'), OFFICIAL)
def test_ten_answers_score_as_in_the_official_tools(answer, people, score):
    assert vqa_accuracy([answer], [people]) == pytest.approx(score)


def test_the_score_of_several_questions_is_their_mean():
    answers, people, scores = zip(*OFFICIAL, strict=True)
    assert vqa_accuracy(answers, people) == pytest.approx(sum(scores) / len(scores))


def test_one_answer_is_right_or_wrong_once_normalised():
    assert vqa_accuracy(['The cat.', 'two', 'dog'], ['cat', ['2'], 'cat']) == pytest.approx(2 / 3)


def test_few_answers_count_all_others_but_one():
    assert vqa_accuracy(['a cat'], [['cat', 'dog']]) == 0.5
    assert vqa_accuracy(['cat'], [['cat', 'cat', 'cat']]) == 1
