"""Tiny data sets in every supported format: real image files, short conversations about them.

The picture holds one coloured square, and the answers name its colour, so a model can really learn something.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image, ImageDraw

TinyFormat: TypeAlias = Literal['llava', 'sharegpt', 'openai', 'minicpmv', 'alpaca']
COLOURS = ('red', 'green', 'blue', 'yellow', 'black', 'white')
_SIDES = (28, 120)  # pixels, the shortest and the longest side of an image
_SYSTEM = 'Answer in a few words.'


@dataclass(frozen=True)
class TinyData:
    """Where a tiny data set lies; image paths in the rows are relative to ``image_folder``."""

    data_path: Path
    image_folder: Path


@dataclass(frozen=True)
class _Talk:
    """One conversation before it is put into a format; ``<image>`` in a question is the place of the next image."""

    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    system: str | None = None


def write_tiny_data(
    directory: str | Path, *, format: TinyFormat = 'llava', rows: int = 8, images: bool = True, seed: int = 0
) -> TinyData:
    """Write ``rows`` conversations and their images.

    The kinds of row repeat in this order: one image; text only; two images; three turns with an image in the second and
    a system message where the format has one. ``alpaca`` rows are all text only.

    Args:
        directory: made if it does not exist; gets ``data.json`` (``openai``: ``data.jsonl``) and ``images/``.
        format: the layout of a row.
        rows: how many.
        images: False makes every row text only.
        seed: of sizes, colours and numbers.

    Raises:
        ValueError: the format is none of the above.
    """
    if format not in get_args(TinyFormat):
        raise ValueError(f'no tiny data of format {format!r}; known are {", ".join(get_args(TinyFormat))}')
    path, rng = Path(directory), random.Random(seed)
    image_folder = path / 'images'
    image_folder.mkdir(parents=True, exist_ok=True)
    with_images = images and format != 'alpaca'
    talks = [_KINDS[index % len(_KINDS)](index, image_folder if with_images else None, rng) for index in range(rows)]
    table = [_ROWS[format](index, talk) for index, talk in enumerate(talks)]
    if format == 'openai':
        data_path = path / 'data.jsonl'
        data_path.write_text(''.join(json.dumps(row) + '\n' for row in table), encoding='utf-8')
    else:
        data_path = path / 'data.json'
        data_path.write_text(json.dumps(table, indent=1), encoding='utf-8')
    return TinyData(data_path, image_folder)


def _draw(name: str, folder: Path, rng: random.Random) -> str:
    """Write a picture of one square; returns the colour of the square."""
    width, height = rng.randint(*_SIDES), rng.randint(*_SIDES)
    colour, wall = rng.sample(COLOURS, 2)
    image = Image.new('RGB', (width, height), wall)
    side = min(width, height) // 2
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
    image.save(folder / name)
    return colour


def _one_image(index: int, folder: Path | None, rng: random.Random) -> _Talk:
    if folder is None:
        return _text_only(index, folder, rng)
    name = f'{index:03}.png'
    colour = _draw(name, folder, rng)
    return _Talk((name,), (('<image>\nWhat colour is the square?', f'The square is {colour}.'),))


def _text_only(index: int, folder: Path | None, rng: random.Random) -> _Talk:
    left, right = rng.randint(1, 9), rng.randint(1, 9)
    return _Talk((), ((f'What is {left} plus {right}?', f'{left} plus {right} is {left + right}.'),))


def _two_images(index: int, folder: Path | None, rng: random.Random) -> _Talk:
    if folder is None:
        return _text_only(index, folder, rng)
    names = (f'{index:03}_a.jpg', f'{index:03}_b.png')
    first, second = (_draw(name, folder, rng) for name in names)
    return _Talk(names, (('<image>\n<image>\nWhich colours are the squares?', f'{first} and {second}'),))


def _three_turns(index: int, folder: Path | None, rng: random.Random) -> _Talk:
    hello, bye = ('Hello.', 'Hello, how can I help?'), ('Thank you.', 'You are welcome.')
    if folder is None:
        return _Talk((), (hello, *_text_only(index, folder, rng).turns, bye), system=_SYSTEM)
    name = f'{index:03}.jpg'
    colour = _draw(name, folder, rng)
    return _Talk((name,), (hello, ('Here is a square: <image>\nIts colour?', f'{colour}'), bye), system=_SYSTEM)


_KINDS = (_one_image, _text_only, _two_images, _three_turns)


def _messages(talk: _Talk, *, role: str, content: str, user: str, assistant: str) -> list[dict[str, str]]:
    pairs = [pair for question, answer in talk.turns for pair in ((user, question), (assistant, answer))]
    return [{role: who, content: text} for who, text in pairs]


def _llava_row(index: int, talk: _Talk) -> dict[str, Any]:
    row: dict[str, Any] = {'id': f'{index:03}'}
    if talk.images:
        row['image'] = talk.images[0] if len(talk.images) == 1 else list(talk.images)
    return row | {'conversations': _messages(talk, role='from', content='value', user='human', assistant='gpt')}


def _sharegpt_row(index: int, talk: _Talk) -> dict[str, Any]:
    row: dict[str, Any] = {
        'conversations': _messages(talk, role='from', content='value', user='human', assistant='gpt')
    }
    return (
        row | ({'images': list(talk.images)} if talk.images else {}) | ({'system': talk.system} if talk.system else {})
    )


def _openai_row(index: int, talk: _Talk) -> dict[str, Any]:
    messages = _messages(talk, role='role', content='content', user='user', assistant='assistant')
    if talk.system:
        messages.insert(0, {'role': 'system', 'content': talk.system})
    return {'messages': messages} | ({'images': list(talk.images)} if talk.images else {})


def _minicpmv_row(index: int, talk: _Talk) -> dict[str, Any]:
    """One image is a path and ``<image>``; several are a dict whose keys ``<image_00>``, ... stand in the text."""
    row: dict[str, Any] = {'id': f'{index:03}'}
    messages = _messages(talk, role='role', content='content', user='user', assistant='assistant')
    if len(talk.images) == 1:
        row['image'] = talk.images[0]
    elif talk.images:
        row['image'] = {f'<image_{number:02}>': name for number, name in enumerate(talk.images)}
        for mark in row['image']:
            message = next(message for message in messages if '<image>' in message['content'])
            message['content'] = message['content'].replace('<image>', mark, 1)
    return row | {'conversations': messages}


def _alpaca_row(index: int, talk: _Talk) -> dict[str, Any]:
    *history, (instruction, output) = talk.turns
    row: dict[str, Any] = {'instruction': instruction, 'input': '', 'output': output}
    return (
        row
        | ({'history': [list(turn) for turn in history]} if history else {})
        | ({'system': talk.system} if talk.system else {})
    )


_ROWS: Mapping[str, Callable[[int, _Talk], dict[str, Any]]] = {
    'llava': _llava_row,
    'sharegpt': _sharegpt_row,
    'openai': _openai_row,
    'minicpmv': _minicpmv_row,
    'alpaca': _alpaca_row,
}
