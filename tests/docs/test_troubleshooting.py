"""Every message that the page explains is still one that the program prints."""

import ast
import re

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text('utf-8')
MESSAGES = re.findall(r'^\| `(.+?)` \|', PAGE, re.MULTILINE)
OTHERS = ('operator torchvision::nms does not exist',)  # torch prints it


def texts():
    """Every text of the package, with one mark for each value that it is filled with."""
    for path in (ROOT / 'vlmtune').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEXTS = list(texts())


def is_printed(message):
    pieces = [piece for piece in re.split('…', message) if piece.strip(' ,;:()')]
    pattern = '.*'.join(map(re.escape, pieces))
    return any(re.search(pattern, text, re.DOTALL) for text in TEXTS)


@pytest.mark.parametrize('message', [message for message in MESSAGES if message not in OTHERS])
def test_a_message_of_the_page_is_printed_by_the_package(message):
    assert is_printed(message)


def test_a_message_that_was_reworded_would_be_noticed():
    assert not is_printed('holds … checkpoints of a former run')
    assert len(MESSAGES) > 25
