"""The report in a headless browser: images are shown, the console is silent, nothing is fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALLED = next((path for name in BROWSERS if (path := shutil.which(name))), None)
LOADED = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        # Root, as in a container, may not use the sandbox.
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        try:
            found = p.chromium.launch(executable_path=INSTALLED, args=flags)
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_report_opens(
    browser: Any, written: tuple[Path, list[Path]], scheme: str, width: int
) -> None:
    run, _ = written
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto((run / "report.html").as_uri())
    page.wait_for_load_state("load")
    assert page.evaluate(LOADED) == [True] * 11
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [page.url]
    assert page.evaluate(OVERFLOW) <= 0  # wide tables scroll by themselves
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    page.click("text=All settings")
    assert page.is_visible("text=train.lr")
    page.close()
