"""The soft accuracy of VQA: an answer is as right as people agree with it.

The rule is that of the evaluation tools of visualqa.org (github.com/GT-Vision-Lab/VQA, vqaEval.py), its normalisation
of answers included.
"""

import re
import statistics
from collections.abc import Sequence

from vlmtune.evaluation.metrics.pairs import References, in_pairs

_ENOUGH = 3  # people who have to give an answer for it to be fully right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = dict(
    none='0',
    zero='0',
    one='1',
    two='2',
    three='3',
    four='4',
    five='5',
    six='6',
    seven='7',
    eight='8',
    nine='9',
    ten='10',
)
_ARTICLES = ('a', 'an', 'the')
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Each word is known with any one of its apostrophes left out; the tools write one word the other way round.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _WITH_APOSTROPHES for mark in re.finditer("'", word)
} | {"somebody'd": 'somebodyd'}


def vqa_accuracy(predictions: Sequence[str], references: References) -> float:
    """Mean share of people, at most three, who gave the same answer, each left out in turn; in [0, 1].

    With the ten answers per question of VQA it is the official number. With fewer, all others but one are enough; one
    reference is right or wrong. Answers are normalised (case, articles, punctuation, number words, apostrophes) where
    the references differ, as officially, and where there is one reference.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    return statistics.fmean(_agreement(*pair) for pair in in_pairs(predictions, references))


def _agreement(prediction: str, references: Sequence[str]) -> float:
    answer, *answers = (text.replace('\n', ' ').replace('\t', ' ').strip() for text in (prediction, *references))
    if len(answers) == 1 or len(set(answers)) > 1:
        answer, *answers = (_normalise(text) for text in (answer, *answers))
    same, others = answers.count(answer), len(answers) - 1
    if not others:
        return float(same)
    enough = min(_ENOUGH, others)
    without_one_that_agrees, without_another = min(1.0, (same - 1) / enough), min(1.0, same / enough)
    return (same * without_one_that_agrees + (len(answers) - same) * without_another) / len(answers)


def _normalise(text: str) -> str:
    glued = re.search(r'\d,\d', text) is not None
    bare = text
    for mark in _PUNCTUATION:
        apart = f'{mark} ' in text or f' {mark}' in text
        bare = bare.replace(mark, '' if glued or apart else ' ')
    bare = re.sub(r'\.(?!\d)', '', bare)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return ' '.join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
