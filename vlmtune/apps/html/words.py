"""Pages that run and fetch nothing, and small pieces of HTML; what others wrote goes through ``text`` into them."""

import re
from collections.abc import Sequence
from html import escape
from string import Template

from vlmtune.utils.secrets import without_secrets

_COLOURS = 8  # of the plots
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]')

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(body: str, *, title: str, style: str) -> str:
    """One file, no script, nothing fetched; ``body`` and ``style`` are HTML and CSS, ``title`` is any text."""
    return _PAGE.substitute(title=text(title), style=style, body=body)


def text(value: object) -> str:
    """A text as it is: no markup in it works, secrets and what HTML may not hold are replaced."""
    return escape(_FORBIDDEN.sub('\ufffd', without_secrets(str(value))))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, label: str = '') -> str:
    """A table that scrolls in itself; cells are HTML, the first of a row names it."""
    top = ''.join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ''.join(
        f'<tr><th scope="row">{row[0]}</th>' + ''.join(f'<td>{cell}</td>' for cell in row[1:]) + '</tr>' for row in rows
    )
    caption = f'<caption>{label}</caption>' if label else ''
    return f'<div class="scroll"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def chip(name: str, colour: int | str) -> str:
    """A name with its colour; a colour is a number of the plots or a class of the style sheet."""
    kind = f'c{colour % _COLOURS}' if isinstance(colour, int) else colour
    return f'<span class="chip"><i class="{kind}"></i>{text(name)}</span>'


def folded(summary: str, inside: str) -> str:
    """What opens with a click."""
    return f'<details><summary>{summary}</summary>{inside}</details>'
