"""Text -> tokens, with user text staying text: what it holds of control tokens is written out as plain words.

Letters: L tokens.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from vlmtune.data.rendering import Rendered, Span
from vlmtune.utils.errors import DataError


class Encoded(NamedTuple):
    """Tokens and the characters [start, end) they stand for: int32[L], int64[L], int64[L]."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class TextEncoder:
    """Encodes rendered conversations and plain text the way a family's own processor does it.

    Args:
        tokenizer: of the model, complete: later changes of its tokens are not seen.
        image_token: the token that stands for image features; None for text models.
        words: a regular expression of added tokens that are words, which user text may hold.
    """

    def __init__(self, tokenizer: Any, *, image_token: int | None, words: str | None = None) -> None:
        self.tokenizer, self.image_token = tokenizer, image_token
        pattern = re.compile(words or '(?!)')
        added = (i for token, i in tokenizer.get_added_vocab().items() if not pattern.fullmatch(token))
        control = np.array([*tokenizer.all_special_ids, *added], np.int64)
        self._is_control = np.zeros(control.max(initial=0) + 2, bool)  # of token ids; the last entry of all larger ones
        self._is_control[control] = True
        self._known_ids: dict[str, np.ndarray] = {}

    def encode(self, rendered: Rendered) -> Encoded:
        """Tokens of the whole text."""
        special = self._adds_special(rendered)
        pieces = self._tokenizer_pieces(rendered.text, 0, special=special)
        if literal := self._spans_with_control_tokens(pieces, rendered.contents):
            pieces = self._encode_around(rendered.text, literal, special=special)
        return pieces

    def literal_ids(self, text: str) -> np.ndarray:
        """Token ids int32[L] of plain text: no special token is added, control tokens in it stay text.

        Raises:
            DataError: the tokenizer cannot write an image token in it as text.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)['input_ids'])
        if found := [token for token in ids if token == self.image_token]:
            raise DataError(
                f'the text holds {len(found)} image tokens that the tokenizer cannot write as text; remove them'
            )
        return np.array(ids, np.int32)

    def template_ids(self, text: str) -> np.ndarray:
        """Token ids int32[L] of a text of our own, in which control tokens are meant; remembered."""
        if text not in self._known_ids:
            self._known_ids[text] = np.array(self.tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
        return self._known_ids[text]

    def _adds_special(self, rendered: Rendered) -> bool:
        """Image families' processors let the tokenizer add BOS unless the template wrote it; text models never do."""
        bos = self.tokenizer.bos_token
        before = rendered.text[: rendered.contents[0].start] if rendered.contents else rendered.text
        return self.image_token is not None and not (bos and bos in before)

    def _tokenizer_pieces(self, text: str, offset: int, *, special: bool) -> Encoded:
        backend = self.tokenizer.backend_tokenizer  # calling the tokenizer itself makes lists of lists: a third slower
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        backend.no_truncation()
        backend.no_padding()
        encoding = backend.encode(text, add_special_tokens=special)
        spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2) + offset
        return Encoded(np.array(encoding.ids, np.int32), spans[:, 0], spans[:, 1])

    def _spans_with_control_tokens(self, pieces: Encoded, contents: Sequence[Span]) -> list[Span]:
        """The texts in which the tokenizer found a control token, or a part of one that goes on in the next text."""
        found = np.flatnonzero(
            self._is_control[np.minimum(pieces.ids, len(self._is_control) - 1)] & (pieces.ends > pieces.starts)
        )
        starts, ends = pieces.starts[found].tolist(), pieces.ends[found].tolist()
        return [s for s in contents if any(a < s.end and b > s.start for a, b in zip(starts, ends, strict=True))]

    def _encode_around(self, text: str, literal: Sequence[Span], *, special: bool) -> Encoded:
        """The slow way: the texts in ``literal`` are tokenised alone, specials switched off."""
        parts, at = [], 0
        for span in literal:
            parts.append(self._tokenizer_pieces(text[at : span.start], at, special=special))
            ids = self.literal_ids(text[span.start : span.end])
            parts.append(Encoded(ids, np.full(len(ids), span.start), np.full(len(ids), span.end)))
            at, special = span.end, False
        parts.append(self._tokenizer_pieces(text[at:], at, special=special))
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))
