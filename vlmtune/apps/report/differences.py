"""Where an answer departs from its reference, word by word; characters count as words in scripts without spaces."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal['same', 'extra', 'missing']

_WORD = re.compile(r'\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|\w+|[^\w\s])|\s+')
_MOST = 3000  # words that are compared
_EXACT = 400  # words; in longer texts frequent ones are no anchors, or the comparison would take minutes


class Piece(NamedTuple):
    """A stretch of text: in both, in the answer only, or in the reference only."""

    text: str
    kind: Kind


def differences(answer: str, references: Sequence[str]) -> list[Piece]:
    """The answer in pieces, compared with the reference that is nearest to it.

    Without references, or where texts are too long to compare, the answer is one piece of kind 'same'.
    """
    words = _WORD.findall(answer)
    others = [other for reference in references if len(other := _WORD.findall(reference)) <= _MOST]
    if not others or len(words) > _MOST:
        return [Piece(answer, 'same')]
    matchers = [(SequenceMatcher(None, words, other, autojunk=len(other) > _EXACT), other) for other in others]
    nearest, reference = max(matchers, key=lambda pair: pair[0].ratio())
    pieces: list[Piece] = []
    for tag, a, b, c, d in nearest.get_opcodes():
        if tag == 'equal':
            pieces.append(Piece(''.join(words[a:b]), 'same'))
            continue
        if d > c:
            pieces.append(Piece(''.join(reference[c:d]), 'missing'))
        if b > a:
            pieces.append(Piece(''.join(words[a:b]), 'extra'))
    return pieces
