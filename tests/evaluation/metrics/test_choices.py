import pytest

from vlmtune.evaluation import multiple_choice
from vlmtune.evaluation.metrics.choices import read_choice

QUESTION = 'What is it?\nA. a cat\nB. a dog\n(C) an ox\nD：一只鸟\nAnswer with the letter.'


@pytest.mark.parametrize(
    ('answer', 'letter'),
    [
        ('B', 'B'),
        (' b. ', 'B'),
        ('B.', 'B'),
        ('(B)', 'B'),
        ('**B**', 'B'),
        ('B) a dog', 'B'),
        ('B: a dog', 'B'),
        ('B、一只狗', 'B'),
        ('（B）', 'B'),
        ('[C]', 'C'),
        ('The answer is B.', 'B'),
        ('The correct answer is (B), not A.', 'B'),
        ('Answer: **C**', 'C'),
        ('the answer is b', 'B'),
        ('答案是B', 'B'),
        ('答案：(D)', 'D'),
        ('我选 C。', 'C'),
        ('我认为（B）对', 'B'),
        ('Option B is correct', 'B'),
        ('I think (C) fits best', 'C'),
        ('I think it is C', 'C'),
        ('A cat sits there, so B', 'B'),
        ('A cat sits there', None),
        ("I don't know", None),
        ('The answer is a cat', None),
        ('either B or C', None),
        ('(B) or (C)', None),
        ('B, C', None),
        ('B and C', None),
        ('B. A cat', 'B'),
        ('(B) a dog, as (A) is a cat', 'B'),
        ('The answer is B. No, the answer is C.', 'C'),
        ('b', 'B'),
        ('b)', 'B'),
        ('(b)', 'B'),
        ('**b**', 'B'),
        ('b) a dog', 'B'),
        ('(b) a dog', 'B'),
        ('b. a dog', 'B'),
        ('b: a dog', 'B'),
        ('b、一只狗', 'B'),
        ('a', 'A'),
        ('I think (c) fits best', 'C'),
        ('the answer is (b), not (a)', 'B'),
        ('Answer: **c**', 'C'),
        ('答案是b', 'B'),
        ('a cat', None),
        ('a cat sits there', None),
        ('a dog, or (b)', 'B'),
        ('e.g. a dog', None),
        ('i.e. a dog', None),
        ('b or c', None),
        ('b, c', None),
        ('(b) and (c)', None),
        ('two cat(s)', None),
        ('I see two options.', None),
        ('no answers', None),
        ('', None),
        ('12', None),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert read_choice(answer) == letter


def test_an_answer_may_be_the_text_of_a_choice():
    samples = [dict(question=QUESTION)] * 5
    answers = ['A dog.', 'an ox', '一只鸟', 'a bird', 'a cat']
    assert multiple_choice(answers, ['B', 'C. an ox', 'D', 'A', 'a dog'], samples=samples) == 3 / 5


def test_choices_may_be_listed_by_small_letters():
    samples = [dict(question='What is it?\na. a cat\n(b) a dog')] * 2
    assert multiple_choice(['A dog.', 'a'], ['b', 'a cat'], samples=samples) == 1


def test_letters_are_compared_and_not_texts():
    assert multiple_choice(['(B)', 'B. a dog', 'The answer is A'], ['B', ['B'], 'B. a dog']) == 2 / 3


def test_without_letters_texts_are_compared():
    assert multiple_choice(['Yes.', 'no'], ['yes', 'yes']) == 0.5
