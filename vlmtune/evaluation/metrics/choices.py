"""Questions with lettered choices: which letter does an answer give?"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.evaluation.metrics.pairs import References, in_pairs

_BRACKETED = r'[\(（\[]\s*\**([A-Za-z])\**\s*[\)）\]]'


def _letter(letters: str) -> str:
    return rf'[\(（\[]?\s*\**([{letters}])\**\s*[\)）\]]?'


def _at_the_start(letters: str, *, then: str) -> re.Pattern[str]:
    """A letter with nothing behind it, a closing bracket or ``then``, and no other letter beside it."""
    joined = rf'(?!\W*(?:or|and|或|和|/|&)\W*[{letters}](?![\w\']))'
    listed = rf'(?!\s*[,、]\s*[\(（\[]?[{letters}][\)）\]]?\s*(?:[.,、]|$))'
    return re.compile(rf'\W*?{_letter(letters)}{joined}{listed}(?:\s*$|(?<=[\)）\]])|\s*(?:{then}))')


# 'B', '(B)', '**B**', 'B.', 'B) a cat', 'B: a cat', 'b', '(b)', 'b. a cat'; 'A cat', 'a cat' and 'e.g. a cat' are none.
_AT_THE_START = (_at_the_start('A-Z', then='[.:,;、．，。：]'), _at_the_start('a-z', then=r'[.:](?=\s|$)|[、．，。：]'))
# 'the answer is (B)', 'Answer: b', 'option B is correct', '答案是B', '选 B', '选项：B'; 'the answer is a cat' is none.
_NAMED = re.compile(
    r'(?:(?:answer|option|choice)(?-i:(?![a-z]))|答案|选项|选择|选)(?:\s+is)?(?:\s*[:：是为]\s*|\s+|(?=[A-Z(（\[*]))'
    rf'(?:(?-i:{_letter("A-Z")})(?![\w\'])|{_BRACKETED}|\**([a-z])(?=\W*$|[.,;)]))',
    re.I,
)
_IN_BRACKETS = re.compile(rf'(?<![A-Za-z]){_BRACKETED}')  # 'cat(s)' names none
_ALONE = re.compile(r'(?<![\w\'])([A-Z])(?![\w\'])')
_CHOICE = re.compile(r'^\s*[\(（\[]?([A-Za-z])[\)）\].:：、．]\s*(\S.*?)\s*$', re.M)


def multiple_choice(
    predictions: Sequence[str], references: References, *, samples: Sequence[Mapping[str, Any]] | None = None
) -> float:
    """Share of answers that give the right letter; in [0, 1].

    A reference is a letter, a letter with its choice (``B. a cat``), or the text of a choice. An answer without a
    letter counts where it is the text of a choice that the question lists, one per line behind its letter. One that
    names several letters is wrong, unless one of them is called the answer.

    Args:
        predictions: what the model wrote.
        references: for each prediction one or several.
        samples: the prediction rows; their ``question`` lists the choices.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    right = 0
    for i, (prediction, found) in enumerate(in_pairs(predictions, references)):
        choices = _choices(samples[i]['question']) if samples is not None else {}
        given = read_choice(prediction, choices=choices)
        right += any(
            given == read_choice(reference, choices=choices)
            if given is not None
            else _plain(prediction) == _plain(reference)
            for reference in found
        )
    return right / len(predictions)


def read_choice(answer: str, *, choices: Mapping[str, str] | None = None) -> str | None:
    """The letter that an answer gives, or None.

    Args:
        answer: in any of the usual forms: ``B``, ``(B)``, ``B. a cat``, ``The answer is B.``, ``答案是B``; small
            letters, too, where they cannot be words: ``b``, ``(b)``, ``b) a cat``.
        choices: {letter: text} of the question, for an answer that is the text of one.
    """
    text = answer.strip()
    for letter, choice in (choices or {}).items():
        if _plain(text) == _plain(choice):
            return letter
    for pattern in _AT_THE_START:
        if start := pattern.match(text):
            return start[1].upper()
    if named := [next(filter(None, match.groups())).upper() for match in _NAMED.finditer(text)]:
        return named[-1]
    for pattern in (_IN_BRACKETS, _ALONE):
        letters = {match[1].upper() for match in pattern.finditer(text)}
        if pattern is _ALONE:
            letters -= {'A', 'I'}  # words of their own, in a sentence
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _choices(question: str) -> dict[str, str]:
    return {letter.upper(): text for letter, text in _CHOICE.findall(question)}


def _plain(text: str) -> str:
    return text.strip().strip('.。').casefold()
