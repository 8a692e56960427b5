"""A real browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """Where Chromium is: ``MAESTRO_CHROMIUM``, or the first on the path."""
    return os.environ.get("MAESTRO_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
    path = chromium_path()
    if path is None:
        pytest.skip("there is no Chromium: `apt-get install -y chromium`, or MAESTRO_CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(browser: Any, width: int = 1200, height: int = 900) -> Iterator[Any]:
    """A page that allows no error: an exception, a refused script, or a request to anywhere but this machine."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(60_000)  # of a machine with much else to do
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: None if _is_ours(request.url) else wrong.append(request.url))
    try:
        yield page
        assert page.evaluate("window.pwned") is None
        assert wrong == []
    finally:
        page.close()


def _is_ours(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "file:", "data:", "about:")) and ":9/" not in url
