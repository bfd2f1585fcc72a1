"""The fenced blocks of the documentation.

A fence's info string says what its block is: ``json``, ``jsonl FORMAT`` and ``csv FORMAT`` (a file of rows), ``python``
(a part of a config unless it says more), ``python run`` (a program), ``python title=FILE`` (a file of the page), ``sh``
or nothing (commands and output).
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), ROOT / 'quickstart' / 'README.md'])
_FENCE = re.compile(r'^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r'`(vlmtune [^`\n]+)`')


class Block(NamedTuple):
    """A fenced block and where it begins."""

    page: str
    line: int
    info: str
    text: str
    before: str  # the text between this block and the one before

    @property
    def id(self) -> str:
        return f'{self.page}:{self.line}'


def blocks(kind: str | None = None) -> list[Block]:
    """All blocks, or those whose info string is ``kind``."""
    found = [block for page in PAGES for block in _blocks_of(page)]
    return [block for block in found if kind is None or block.info == kind]


def _blocks_of(page: Path) -> Iterator[Block]:
    text, end = page.read_text(encoding='utf-8'), 0
    for match in _FENCE.finditer(text):
        line = text.count('\n', 0, match.start()) + 1
        name = page.relative_to(ROOT).as_posix()
        yield Block(name, line, match['info'].strip(), match['text'], text[end : match.start()])
        end = match.end()


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of ours: where it stands, and its words without ``vlmtune``.

    Of a synopsis, ``[--option a|b]`` is taken, with the first of its values.
    """
    found = []
    for block in blocks():
        if block.info in ('', 'sh', 'bash', 'console'):
            joined = block.text.replace('\\\n', ' ')
            found += [(block.id, line) for line in joined.splitlines() if re.match(r'\s*(\$ )?vlmtune ', line)]
    for page in PAGES:
        text = _FENCE.sub('', page.read_text(encoding='utf-8'))
        found += [(page.name, match) for match in _INLINE.findall(text)]
    return [(where, words) for where, line in found if (words := _words(line))]


def _words(line: str) -> list[str]:
    taken = re.sub(r'(?<!\S)\[([^\]]*)\](?!\S)', r'\1', line.strip().removeprefix('$ '))
    words = [re.sub(r'^(\w+)(\|\w+)+$', r'\1', word) for word in shlex.split(taken, comments=True)[1:]]
    for stop in ('|', '>', '<', '&&', ';', '2>&1', '&'):
        words = words[: words.index(stop)] if stop in words else words
    return words
