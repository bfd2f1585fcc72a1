"""Tokens that a recipe adds: control tokens, and those that texts may hold, such as the marks of a table."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from vlmtune.utils.errors import ConfigError


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[str, ...]:
    """Let the tokenizer read each of ``tokens`` as one control token; returns those that it did not know.

    Raises:
        ConfigError: not a list of texts.
    """
    new = _unknown(tokenizer, tokens, setting='special_tokens')
    tokenizer.add_special_tokens({'additional_special_tokens': list(tokens)}, replace_extra_special_tokens=False)
    return new


def add_new_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[str, ...]:
    """Let the tokenizer read each of ``tokens`` as one token; returns those that it did not know.

    They are no special tokens: in questions and answers they count as the token, not as its letters, and decoding keeps
    them, with ``skip_special_tokens`` as well.

    Raises:
        ConfigError: not a list of texts, or one of them is a control token of the tokenizer.
    """
    new = _unknown(tokenizer, tokens, setting='new_tokens')
    if taken := sorted(set(tokens) & set(tokenizer.all_special_tokens)):
        raise ConfigError(
            f'new_tokens: {taken[0]!r} is a control token of this model, which texts cannot hold; rename it'
        )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new])
    return new


def _unknown(tokenizer: Any, tokens: Any, *, setting: str) -> tuple[str, ...]:
    """Those of ``tokens`` that the tokenizer does not know, each once."""
    is_list = isinstance(tokens, list | tuple)
    if not is_list or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise ConfigError(f"{setting}={tokens!r}: expected a list of texts, for example ['<table_begin>']")
    known = tokenizer.get_vocab()
    return tuple(dict.fromkeys(token for token in tokens if token not in known))
