"""The page in a real browser: it sorts, filters and turns pages, on wide and narrow screens, and says nothing to the console.

Needs Chromium and `pip install -r requirements-browser.txt`; left out where they are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_page import NAMES, write_folder
from utils import page as page_module
from utils.metrics import PictureScore, summarise
from utils.page import write_page
from utils.report import write_scores

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[1200, 390])
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda sent: said.append(sent.url) if sent.url.startswith("http") else None)
    yield opened
    assert said == []
    opened.close()


def names_of(tab: Any) -> list[str]:
    return tab.locator(".entry b").all_text_contents()


def test_pictures_are_sorted_filtered_and_found_by_name(tab: Any, tmp_path: Path) -> None:
    tab.goto(write_page(write_folder(tmp_path / "run", uncertain=True)).as_uri())
    # The truth is the left half, a mask the upper half and some rows more, picture by picture.
    assert names_of(tab) == [*NAMES]
    tab.select_option("#sort", label="IoU, highest first")
    assert names_of(tab) == [*NAMES[::-1]]
    tab.select_option("#difficulty", "easy")
    assert names_of(tab) == [NAMES[1]]
    tab.select_option("#difficulty", "")
    tab.fill("#search", "BÜRO")
    assert names_of(tab) == [NAMES[2]]
    assert tab.locator(".tile").count() == 6
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    link = tab.locator(".tile").first.get_attribute("href")
    assert link == "b%C3%BCro%202_img.png"
    tab.fill("#search", "nowhere")
    assert names_of(tab) == []
    assert "0 pictures" in tab.locator("#place").text_content()


def test_thousands_of_pictures_are_turned_through(tab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "run", ("a",))
    rng = np.random.default_rng(0)
    scores = [
        PictureScore(f"{number:04d}", "easy" if number % 3 else "hard", *rng.random(4).tolist(), False, False)
        for number in range(4428)
    ]
    write_scores(folder, summarise(scores), scores)
    tile = page_module.strip(folder, "a")
    monkeypatch.setattr(page_module, "strip", lambda folder, name: tile)
    tab.goto(write_page(folder).as_uri())
    assert "page 1 of 185, 4428 pictures" in tab.locator("#place").text_content()
    lowest = sorted(scores, key=lambda score: score.iou)
    assert names_of(tab) == [score.name for score in lowest[:24]]
    assert tab.locator("#previous").is_disabled()
    tab.click("#next")
    assert names_of(tab) == [score.name for score in lowest[24:48]]
    tab.select_option("#difficulty", "hard")
    assert "page 1 of 62, 1476 pictures" in tab.locator("#place").text_content()
