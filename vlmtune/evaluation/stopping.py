"""What ends an answer early: texts in it, and whoever asked for it.

Letters: B rows, L tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from vlmtune.utils.errors import ConfigError


class _InAnswer(StoppingCriteria):
    """``inner``, which sees no prompt: a stop string may not begin there."""

    def __init__(self, inner: StoppingCriteria, *, prompt_length: int) -> None:
        self.inner, self.prompt_length = inner, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done: bool[B], of input_ids long[B, L]."""
        return self.inner(input_ids[:, self.prompt_length :], scores, **kwargs)


class _Asked(StoppingCriteria):
    """Ends all rows once ``should_stop`` says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done: bool[B], of input_ids long[B, L]."""
        return torch.full((len(input_ids),), self.should_stop(), dtype=torch.bool, device=input_ids.device)


def stopping_criteria(
    tokenizer: Any,
    *,
    prompt_length: int,
    stop_strings: str | Sequence[str] = (),
    should_stop: Callable[[], bool] | None = None,
) -> StoppingCriteriaList:
    """Criteria for transformers' ``generate``; none where nothing is asked for.

    Args:
        tokenizer: of the model.
        prompt_length: tokens of the prompt, padding included.
        stop_strings: a row that holds one is done; they may be special tokens. See ``cut_at``.
        should_stop: asked after every token; True ends all rows.

    Raises:
        ConfigError: a stop string is empty, or none.
    """
    found = StoppingCriteriaList()
    if strings := as_stop_strings(stop_strings):
        found.append(_InAnswer(StopStringCriteria(tokenizer, strings), prompt_length=prompt_length))
    if should_stop is not None:
        found.append(_Asked(should_stop))
    return found


def as_stop_strings(given: str | Sequence[str], *, name: str = 'stop_strings') -> list[str]:
    """One or several stop strings as a list; ``name`` is the key they stand under, for the message.

    Raises:
        ConfigError: one is empty, or no text.
    """
    strings = [given] if isinstance(given, str) else list(given)
    if wrong := [string for string in strings if not isinstance(string, str) or not string]:
        raise ConfigError(f'{name} holds {wrong[0]!r}; expected texts of at least one character')
    return strings


def cut_at(text: str, stop_strings: str | Sequence[str]) -> str:
    """What an answer says before the first stop string."""
    places = [text.find(string) for string in as_stop_strings(stop_strings)]
    return text[: min((place for place in places if place >= 0), default=len(text))]
