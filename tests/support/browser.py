"""A headless Chromium for tests of the report."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

if CHROMIUM is None and os.environ.get("CI") == "true":
    raise RuntimeError("tests of the report need Chromium: apt-get install chromium")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's Chromium."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


class Sheet:
    """A report in a page, with everything that went wrong or over the network noted."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, scheme: Any = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page: Page = context.new_page()
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.resolve().as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)

    def boxes(self) -> list[str]:
        """What the boxes of the graph are called, for a screen reader."""
        found = self.page.locator("#canvas .node").evaluate_all(
            "boxes => boxes.map(box => box.getAttribute('aria-label'))"
        )
        return [str(name) for name in found]

    def check(self) -> None:
        """No errors, and nothing fetched but the file itself."""
        assert self.trouble == []
        assert [url.partition("#")[0] for url in self.requests] == [self.address]
