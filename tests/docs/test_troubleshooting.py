"""Every message that the page explains is still one that the program prints."""

import ast
import re

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text('utf-8')
MESSAGES = re.findall(r'^\| `(.+?)` \|', PAGE, re.MULTILINE)
OTHERS = ('operator torchvision::nms does not exist',)  # torch prints it


def texts_of(source):
    """Every text that a file can print, with one mark for each value that it is filled with."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


TEXTS = [text for path in (ROOT / 'vlmtune').rglob('*.py') for text in texts_of(path.read_text('utf-8'))]


def is_printed(message):
    pieces = [piece for piece in re.split('…', message) if piece.strip(' ,;:()')]
    pattern = '.*'.join(map(re.escape, pieces))
    return any(re.search(pattern, text, re.DOTALL) for text in TEXTS)


@pytest.mark.parametrize('message', [message for message in MESSAGES if message not in OTHERS])
def test_a_message_of_the_page_is_printed_by_the_package(message):
    assert is_printed(message)


def test_a_message_that_was_reworded_would_be_noticed():
    assert not is_printed('holds … checkpoints of a former run')
    assert 'a … b' in list(texts_of('"a docstring"\nprint(f"a {1} b")'))
    assert 'a docstring' not in list(texts_of('"a docstring"\nprint(f"a {1} b")'))
    assert len(MESSAGES) > 25
