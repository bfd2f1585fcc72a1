"""The alpaca format."""

from collections.abc import Mapping
from typing import Any

from vlmtune.data.map_fns.marks import place_images
from vlmtune.data.map_fns.objects import place_objects
from vlmtune.data.map_fns.rows import check_keys, image_refs, optional_text, require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation
from vlmtune.structures import BoxConvention, Conversation, ImageRef, Role
from vlmtune.utils.errors import DataError


def alpaca_map_fn(row: Mapping[str, Any], *, boxes: BoxConvention | None = None) -> Conversation:
    """``{"instruction", "input", "output", "system", "history": [[question, answer], ...], "images"}``.

    The question is the instruction and, on a new line, the input; ``<noinput>`` counts as no input. Only
    ``instruction`` and ``output`` are needed. If the row has ``images`` (or ``image``), every ``<image>`` mark shows
    the next one; in a row without images ``<image>`` is plain text.

    Raises:
        DataError: the row is not of this format, the output is empty or ``<nooutput>``, or marks and images differ in
            number.
    """
    check_keys(row)
    texts: list[tuple[Role, str, str]] = []
    if system := optional_text(row, 'system'):
        texts.append(('system', system, "'system'"))
    for i, (question, answer) in enumerate(_history(row)):
        texts += [('user', question, f"'history'[{i}][0]"), ('assistant', answer, f"'history'[{i}][1]")]
    added = optional_text(row, 'input')
    instruction = require_text(row, 'instruction')
    question = '\n'.join(text for text in (instruction, '' if added == '<noinput>' else added) if text)
    output = require_text(row, 'output')
    if output == '<nooutput>':
        raise DataError("'output' is '<nooutput>'; expected an answer, remove the row", kind='empty_answer')
    texts += [('user', question, "'instruction'"), ('assistant', output, "'output'")]

    refs = image_refs(row)
    placed: list[list[str | ImageRef]] = [[text] for _, text, _ in texts]
    if refs:
        placed = place_images([text for _, text, _ in texts], refs)
    turns = [Turn(role, pieces, name) for (role, _, name), pieces in zip(texts, placed, strict=True)]
    return build_conversation(place_objects(turns, row, boxes=boxes))


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    history = row.get('history')
    if history is None:
        return []
    if not isinstance(history, list | tuple):
        raise DataError(f"'history' is of type {type(history).__name__}; expected a list of [question, answer]")
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"'history'[{i}] is {pair!r:.80}; expected [question, answer]")
    return [(question, answer) for question, answer in history]
