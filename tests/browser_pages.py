"""Opens pages in a headless Chromium and notes what they complain about or ask of others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
PHONE, DESK = 390, 1280
"""Widths of screens."""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, url: str, width: int = DESK, scheme: str = "light") -> tuple[Page, list[str]]:
    """A page, and what it complains about or asks of other hosts (of a file: of anything). A phone is tapped."""
    size = {"width": width, "height": 800}
    page = browser.new_page(viewport=size, color_scheme=scheme, has_touch=width == PHONE)  # type: ignore[arg-type]
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else wrong.append(request.url))
    page.goto(url)
    return page, wrong
