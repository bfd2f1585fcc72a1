"""An answer as it comes, piece by piece."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vlmtune.evaluation.stopping import as_stop_strings, cut_at


class PieceStreamer(BaseStreamer):
    """Passes an answer on as it is written, and keeps it: what is there when the user stops it is the answer.

    transformers' ``TextStreamer`` waits for the next space, which many scripts do not have; this one waits for the rest
    of a character only. Tokens are decoded behind earlier ones, since some tokenizers take the space off the first.

    Args:
        tokenizer: decodes.
        write: gets every piece; white space before the first word is left out.
        stop_strings: the answer ends before the first of them, and what may be the beginning of one waits.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], *, stop_strings: str | Sequence[str] = ()) -> None:
        self.text = ''
        self._tokenizer, self._write, self._stop_strings = tokenizer, write, as_stop_strings(stop_strings)
        self._is_prompt, self._all = True, ''
        self._tokens: list[int] = []
        self._known = self._new = 0  # tokens that were passed on earlier, and from which on they are new

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt long[1, L], then with every token long[1]."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.flatten().tolist()
        text = self._fresh()
        if text and not text.endswith('\ufffd'):  # else a character whose other bytes are still to come
            self._known, self._new = self._new, len(self._tokens)
            self.pass_on(text)

    def end(self) -> None:
        """Called by transformers."""
        self.pass_on(self._fresh(), is_last=True)

    def _fresh(self) -> str:
        before, now = (
            self._tokenizer.decode(self._tokens[self._known : end], skip_special_tokens=True)
            for end in (self._new, len(self._tokens))
        )
        return str(now[len(before) :])

    def pass_on(self, text: str, *, is_last: bool = False) -> None:
        """Write what follows, as far as it can be no stop string."""
        self._all += text
        said = cut_at(self._all, self._stop_strings)
        if said == self._all and not is_last:
            said = said[: len(said) - self._waiting(said)]
        new = said.lstrip()[len(self.text) :]
        self.text += new
        if new:
            self._write(new)

    def _waiting(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string may begin with."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
