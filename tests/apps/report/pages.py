"""A report as its reader sees it."""

from html.parser import HTMLParser
from pathlib import Path

from vlmtune.apps.report import report

VOID = {'meta', 'img', 'link', 'input'}
NASTY = '</div></title><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" \' {{x}} $title \ud800\x00'
SHOWN = NASTY.replace('\ud800', '\ufffd').replace('\x00', '\ufffd')


class Page(HTMLParser):
    """Elements as [tag, attributes, text inside, classes of what is around]; every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get('class', '').split())]

    def section(self, name):
        return next((text for _, attributes, text in self.all('section') if attributes['id'] == name), None)


def page_of(*folders, **options):
    out = Path(folders[0]).with_name('page.html')
    report([str(folder) for folder in folders], out=str(out), **options)
    return Page(out.read_text('utf-8'))
