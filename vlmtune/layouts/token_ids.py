"""The ids of added tokens, from the files of a tokenizer that is not loaded."""

from collections.abc import Iterator
from pathlib import Path

from vlmtune.utils.errors import ModelError
from vlmtune.utils.pretrained import read_source_json

_FILES = ('added_tokens.json', 'tokenizer_config.json', 'tokenizer.json')


def find_token_id(folder: Path, token: str) -> int:
    """The id of an added token.

    Args:
        folder: of the model; tokenizer.json, tokenizer_config.json and added_tokens.json are looked at.
        token: its text.

    Raises:
        ModelError: no file names it.
    """
    try:
        for name, i in _added_tokens(folder):
            if name == token:
                return i
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(
            f'{folder}: {", ".join(_FILES)}: an added token has no text or no id ({str(error)[:100]})'
        ) from error
    raise ModelError(
        f'{folder}: none of {", ".join(_FILES)} has the added token {token!r}; this tokenizer belongs to another model'
    )


def _added_tokens(folder: Path) -> Iterator[tuple[str, int]]:
    added, config, whole = (read_source_json(str(folder), name) or {} for name in _FILES)
    yield from ((str(name), int(i)) for name, i in added.items())
    yield from ((str(token['content']), int(i)) for i, token in (config.get('added_tokens_decoder') or {}).items())
    yield from ((str(token['content']), int(token['id'])) for token in whole.get('added_tokens') or ())
