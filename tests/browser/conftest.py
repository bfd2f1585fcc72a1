"""A headless Chromium, and pages that note what they fetch and what goes wrong on them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

_SWITCHES = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync'
)
PATIENCE = 60_000  # milliseconds
PHONE, DESK = dict(width=375, height=740), dict(width=1200, height=900)  # pixels


@dataclass
class Watched:
    """A page.

    Attributes:
        page: of playwright.
        fetched: every address it asked for.
        trouble: what its console and its scripts complained of.
    """

    page: Page
    fetched: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def from_elsewhere(self) -> list[str]:
        """What it fetched from anywhere but this machine."""
        return [
            url
            for url in self.fetched
            if urlsplit(url).scheme not in ('data', 'blob', 'file') and urlsplit(url).hostname != '127.0.0.1'
        ]

    def is_wider_than_its_window(self) -> bool:
        """Whether one has to scroll sideways."""
        return self.page.evaluate('document.documentElement.scrollWidth > window.innerWidth')


@pytest.fixture(scope='session')
def chromium() -> Iterator[Browser]:
    """The browser of the system."""
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    assert path is not None, 'no Chromium here; on Debian: apt-get install chromium'
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_SWITCHES.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Watched]]:
    """``open_page(url, window=PHONE)``."""
    opened: list[Page] = []

    def open_it(url: str, window: dict[str, int] = DESK) -> Watched:
        page = chromium.new_page(viewport=window)
        opened.append(page)
        watched = Watched(page)
        page.on('request', lambda request: watched.fetched.append(request.url))
        page.on('pageerror', lambda error: watched.trouble.append(str(error)))
        page.on('console', lambda line: watched.trouble.append(line.text) if line.type == 'error' else None)
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        return watched

    yield open_it
    for page in opened:
        page.close()
