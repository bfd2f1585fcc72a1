"""A data set with every kind of broken row and image among good ones, in the OpenAI messages format."""

import io
import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.utils.errors import DATA_ERROR_KINDS

OVERLONG_WORDS = 2000


@dataclass(frozen=True)
class BrokenData:
    """Where it lies, and what is wrong with it.

    Attributes:
        data_path: a jsonl file; the row of line n is the n-th row, for there is no empty line.
        image_folder: root of the images.
        kinds: {line: kind of the problem} as ``vlmtune check-data`` calls it, without over-long rows and duplicates.
        bad_pixels: lines whose image is broken, though its header and end are sound; they are not in ``kinds``.
        cut: lines whose image has a sound header, but was cut off; they are in ``kinds``.
        overlong: lines with some thousand tokens.
        duplicates: lines that repeat an earlier one.
        good: lines of odd but sound images and rows.
    """

    data_path: Path
    image_folder: Path
    kinds: dict[int, str]
    bad_pixels: list[int]
    cut: list[int]
    overlong: list[int]
    duplicates: list[int]
    good: list[int]


def write_broken_data(directory: str | Path) -> BrokenData:
    """Write ``rows.jsonl``, ``images/`` and what lies outside of it into ``directory``."""
    path = Path(directory)
    folder = path / 'images'
    folder.mkdir(parents=True)
    _write_good_images(folder)
    _write_broken_images(folder)
    good = [_row(f'good {name}', image=name) for name in _GOOD_IMAGES]
    good += [_row('text only'), _row('same question', answer='one'), _row('same question', answer='another')]
    good += [_row(f'plain {i}', image='plain.png') for i in range(4)]
    broken = [(kind, _to_line(row)) for kind, row in _BROKEN_ROWS]
    broken += [(kind, _to_line(_row(f'image {image!r}', image=image))) for image, kind in _BROKEN_IMAGES.items()]
    others = [('bad_pixels', _row('bad pixels', image='bad_pixels.png'))]
    others += [('overlong', _row(' '.join(['long'] * OVERLONG_WORDS)))]
    others += [('duplicate', good[0])]
    table = [('good', _to_line(row)) for row in good] + broken + [(kind, _to_line(row)) for kind, row in others]
    data_path = path / 'rows.jsonl'
    data_path.write_bytes(b''.join(line + b'\n' for _, line in table))
    lines: dict[str, list[int]] = {}
    for number, (kind, _) in enumerate(table, start=1):
        lines.setdefault(kind, []).append(number)
    kinds = {n: kind for kind, numbers in lines.items() if kind in DATA_ERROR_KINDS for n in numbers}
    return BrokenData(
        data_path,
        folder,
        kinds,
        bad_pixels=lines['bad_pixels'],
        cut=[number for number, (_, line) in enumerate(table, start=1) if b'"cut.' in line],
        overlong=lines['overlong'],
        duplicates=lines['duplicate'],
        good=lines['good'],
    )


# ---- rows


def _row(question: str, *, image: str | None = None, answer: str = 'yes') -> dict[str, Any]:
    mark = '' if image is None else '<image>\n'
    messages = [{'role': 'user', 'content': f'{mark}{question}?'}, {'role': 'assistant', 'content': answer}]
    return {'messages': messages} | ({} if image is None else {'images': [image]})


def _to_line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


_QUESTION, _ANSWER = {'role': 'user', 'content': 'why?'}, {'role': 'assistant', 'content': 'so'}
_BROKEN_ROWS: tuple[tuple[str, Any], ...] = (
    ('unreadable_row', b'{"messages": [{"role": "user", "content": "cut o'),
    ('unreadable_row', b'[1, 2]'),
    ('unreadable_row', b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    ('wrong_row', {'conversation': []}),
    ('wrong_row', {'messages': []}),
    ('wrong_row', {'messages': [{'role': 'robot', 'content': 'beep'}, _ANSWER]}),
    ('wrong_row', {'messages': [_QUESTION]}),
    ('wrong_row', {'messages': [{'role': 'user', 'content': 7}, _ANSWER]}),
    ('wrong_row', {'messages': [_QUESTION, _ANSWER], 'video': 'film.mp4'}),
    ('wrong_row', {'messages': [_QUESTION, {'role': 'assistant', 'content': '\ud800'}]}),
    ('mark_mismatch', {'messages': [_QUESTION, _ANSWER], 'images': ['plain.png']}),
    ('mark_mismatch', _row('two images', image='plain.png') | {'images': ['plain.png'] * 2}),
    ('empty_answer', _row('no answer', answer='')),
    ('empty_answer', _row('blank answer', answer=' \n')),
    # the rule of the data set is 'first_turn'
    ('nothing_learned', {'messages': [_QUESTION, {**_ANSWER, 'loss': False}, _QUESTION, _ANSWER]}),
)

# ---- images

_GOOD_IMAGES = ('cmyk.jpg', 'grey16.png', 'palette.png', 'alpha.png', 'animated.gif', 'turned.jpg', 'trailing.jpg')
_BROKEN_IMAGES = {
    'nowhere.png': 'missing_image',
    'cut.jpg': 'broken_image',
    'cut.png': 'broken_image',
    'empty.jpg': 'broken_image',
    'text.jpg': 'broken_image',
    'folder.png': 'broken_image',
    'float.tiff': 'broken_image',
    'huge.png': 'oversized_image',
    'large.png': 'oversized_image',
    '../outside.png': 'refused_image',
    'link.png': 'refused_image',
    'https://example.com/a.png': 'refused_image',
    'nul\0.png': 'refused_image',
    'sliver.png': 'unfit_sample',
}


def _picture(width: int = 60, height: int = 40) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values * np.uint8(37))


def _encoded(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    _picture().save(buffer, format, **options)
    return buffer.getvalue()


def _write_good_images(folder: Path) -> None:
    picture = _picture()
    picture.save(folder / 'plain.png')
    picture.convert('CMYK').save(folder / 'cmyk.jpg')
    Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(folder / 'grey16.png')
    picture.convert('P').save(folder / 'palette.png')
    picture.convert('RGBA').save(folder / 'alpha.png')
    picture.save(folder / 'animated.gif', save_all=True, append_images=[_picture().rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    picture.save(folder / 'turned.jpg', exif=exif)
    (folder / 'trailing.jpg').write_bytes(_encoded('JPEG') + b'left by a phone')


def _write_broken_images(folder: Path) -> None:
    jpeg, png = _encoded('JPEG'), _encoded('PNG')
    (folder / 'cut.jpg').write_bytes(jpeg[: len(jpeg) * 2 // 3])
    (folder / 'cut.png').write_bytes(png[: len(png) * 2 // 3])
    (folder / 'empty.jpg').touch()
    (folder / 'text.jpg').write_text('404 not found')
    (folder / 'folder.png').mkdir()
    Image.fromarray(np.zeros((40, 60), np.float32)).save(folder / 'float.tiff')
    (folder / 'huge.png').write_bytes(_png_header(20_000, 20_000))  # more than Pillow opens
    (folder / 'large.png').write_bytes(_png_header(12_500, 12_500))  # more than we decode
    _picture().save(folder.parent / 'outside.png')
    os.symlink(folder.parent / 'outside.png', folder / 'link.png')
    _picture(300 * 4, 4).save(folder / 'sliver.png')
    pixels = png.index(b'IDAT') + 20
    (folder / 'bad_pixels.png').write_bytes(png[:pixels] + bytes(8) + png[pixels + 8 :])


def _png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""
    chunks = ((b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', b''), (b'IEND', b''))
    out = b'\x89PNG\r\n\x1a\n'
    for name, content in chunks:
        out += struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    return out
