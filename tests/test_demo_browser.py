"""The demo page in a real browser: one server with two tiny models, wide and narrow screens, and nothing left when it ends.

Needs Chromium, `pip install -r requirements-browser.txt` and `pip install -r requirements-demo.txt`; left out where they are missing.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, environment
from tests.test_demo import picture, png_header
from tests.test_pipeline import make_pipeline

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
PATIENCE_MS = 30_000
sync_api.expect.set_options(timeout=PATIENCE_MS)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Server:
    """The page of both objectives, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.uploads = folder / "tmp"
        self.uploads.mkdir()
        for name, settings in (("end_to_end", {"tta": "none"}), ("diffusion", {"ensemble_size": 2})):
            make_pipeline(name, **settings).save_pretrained(folder / name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = ["--port", str(self.port), "--max_upload_mb", "2", "--model", "end_to_end", "--model", "diffusion"]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "demo.py"), *flags],
            cwd=folder, env={**environment(), "TMPDIR": str(self.uploads)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.told = []
        for line in self.process.stdout or ():
            self.told.append(line.strip())
            if line.startswith("the page:"):
                break

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def files(self) -> list[Path]:
        return [path for folder in self.uploads.glob("glass_page_*") for path in folder.rglob("*") if path.is_file()]

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("demo"))
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    picture(60, 40).save(folder / "a.png")
    picture(300, 400).save(folder / "b.jpg")
    (folder / "notes.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "bomb.png").write_bytes(png_header(20_000, 20_000))
    with (folder / "heavy.jpg").open("wb") as file:
        file.truncate(50 * 2**20)
    return folder


class Tab:
    """A visitor's page."""

    def __init__(self, browser: Any, server: Server, viewport: dict[str, int]) -> None:
        self.page = browser.new_page(viewport=viewport)
        self.page.set_default_timeout(PATIENCE_MS)
        self.outside: list[str] = []
        self.page.on("request", lambda sent: self._note(sent.url))
        self.page.on("pageerror", lambda error: self.outside.append(str(error)))
        self.page.goto(server.address)
        self.sentence = self.page.locator("#sentence")

    def _note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.outside.append(url)

    def send(self, path: Path) -> None:
        self.page.set_input_files("#picture input[type=file]", str(path))

    def expect(self, text: str | re.Pattern[str]) -> None:
        sync_api.expect(self.sentence).to_contain_text(text)

    def save(self, name: str, folder: Path) -> Image.Image:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=name, exact=True).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        image = Image.open(path)
        image.load()
        return image

    def close(self) -> None:
        scrolls = self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        self.page.close()
        assert not scrolls
        assert self.outside == []  # neither fonts nor scripts nor reports


@pytest.fixture(params=[WIDE], ids=["wide"])
def tab(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Tab]:
    opened = Tab(browser, server, request.param)
    yield opened
    opened.close()


@pytest.mark.parametrize("tab", [WIDE, NARROW], ids=["wide", "narrow"], indirect=True)
def test_a_picture_is_sent_looked_at_and_saved(tab: Tab, inputs: Path, tmp_path: Path) -> None:
    tab.send(inputs / "a.png")
    tab.expect(re.compile(r"of a\.png \(60 × 40\) is transparent at threshold 0\.5"))
    sync_api.expect(tab.sentence).to_be_in_viewport()
    soft = tab.save("Soft mask", tmp_path)
    assert (soft.size, soft.mode) == ((60, 40), "I;16")
    values = np.asarray(soft) / 65535
    threshold = round(float(np.median(values)), 3)
    tab.page.locator("#threshold input[type=range]").fill(str(threshold))
    tab.expect(f"at threshold {threshold:.3g};")
    mask = tab.save("Mask", tmp_path)
    assert mask.size == (60, 40)
    undecided = np.abs(values - threshold) < 1e-4
    np.testing.assert_array_equal((np.asarray(mask) > 0)[~undecided], (values > threshold)[~undecided])
    assert tab.save("Cut-out", tmp_path).mode == "RGBA"
    tab.page.get_by_label("Uncertainty", exact=True).check()
    sync_api.expect(tab.page.get_by_text("gives one answer only")).to_be_visible()


def test_both_objectives_are_offered(tab: Tab, inputs: Path, server: Server) -> None:
    assert server.told[:4] == [
        "loading end_to_end", "end to end, 32 x 32 pixels, float32 on cpu",
        "loading diffusion", "diffusion, 32 x 32 pixels, float32 on cpu",
    ]  # fmt: skip
    tab.page.get_by_text("Settings of the model").click()
    steps = tab.page.get_by_text("Denoising steps")
    sync_api.expect(steps).to_be_hidden()
    tab.page.get_by_label("Model", exact=True).click()
    tab.page.get_by_role("option", name="diffusion").click()
    sync_api.expect(steps).to_be_visible()
    tab.send(inputs / "a.png")
    tab.expect("of a.png")
    tab.page.get_by_label("Uncertainty", exact=True).check()
    sync_api.expect(tab.page.get_by_text("0, all agree")).to_be_visible()


def test_what_cannot_be_used_gets_a_sentence_and_the_page_lives_on(tab: Tab, inputs: Path) -> None:
    for name, told in (
        ("notes.png", "notes.png is no picture that can be read here"),
        ("dot.png", "dot.png has 1 x 1 pixels"),
        ("bomb.png", "bomb.png has more than the 25 million pixels"),
    ):
        tab.send(inputs / name)
        tab.expect(told)
    tab.send(inputs / "heavy.jpg")
    sync_api.expect(tab.page.locator(".toast-body")).to_contain_text("exceed the maximum allowed size of 2.0 Mb")
    tab.send(inputs / "b.jpg")
    tab.expect("of b.jpg (300 × 400)")


def test_two_visitors_at_once_see_their_own(browser: Any, server: Server, inputs: Path, tmp_path: Path) -> None:
    tabs = [Tab(browser, server, WIDE) for _ in range(2)]
    for tab, name in zip(tabs, ("a.png", "b.jpg"), strict=True):
        tab.send(inputs / name)
    for tab, name in zip(tabs, ("a.png (60 × 40)", "b.jpg (300 × 400)"), strict=True):
        tab.expect(name)
    for tab, threshold in zip(tabs, ("0.1", "0.9"), strict=True):
        tab.page.locator("#threshold input[type=range]").fill(threshold)
    for tab, told in zip(tabs, ("a.png (60 × 40) is transparent at threshold 0.1;", "b.jpg (300 × 400)"), strict=True):
        tab.expect(told)
    tabs[1].expect("at threshold 0.9;")
    assert [tab.save("Overlay", tmp_path).size for tab in tabs] == [(60, 40), (300, 400)]
    for tab in tabs:
        tab.close()


def test_a_batch_names_the_bad_file_and_packs_the_others(tab: Tab, inputs: Path, tmp_path: Path) -> None:
    tab.page.get_by_role("tab", name="Several pictures").click()
    names = ("a.png", "notes.png", "b.jpg")
    tab.page.set_input_files("#uploads input[type=file]", [str(inputs / name) for name in names])
    sync_api.expect(tab.page.locator("#uploads").get_by_role("link")).to_have_count(len(names))
    tab.page.get_by_role("button", name="Find glass in all").click()
    sync_api.expect(tab.page.get_by_text("Done at threshold 0.5, 2 of 3, see below.")).to_be_visible()
    sync_api.expect(tab.page.locator("table.rows")).to_contain_text("notes.png is no picture")
    sync_api.expect(tab.page.locator("#gallery img")).to_have_count(2)
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save masks (zip)").click()
    download.value.save_as(tmp_path / "masks.zip")
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert archive.namelist() == ["01_a_mask.png", "03_b_mask.png"]


@pytest.mark.slow
def test_an_example_and_the_camera_give_pictures_too(tab: Tab) -> None:
    tab.page.locator(".gallery-item").first.click()
    tab.expect("of easy_00000.jpg (128 × 128)")
    tab.page.locator("#picture").get_by_label("Remove Image").click()
    tab.expect("Choose or take a picture")
    tab.page.get_by_label("Capture from camera").click()
    tab.page.get_by_text("Click to Access Webcam").click()
    tab.page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    tab.page.get_by_label("capture photo").click()
    tab.expect("is transparent at threshold")


def test_whoever_leaves_leaves_nothing_and_the_end_is_clean(browser: Any, server: Server, inputs: Path) -> None:
    tab = Tab(browser, server, NARROW)
    tab.send(inputs / "a.png")
    tab.expect("of a.png")
    tab.page.get_by_role("tab", name="Several pictures").click()
    tab.page.set_input_files("#uploads input[type=file]", str(inputs / "b.jpg"))
    sync_api.expect(tab.page.locator("#uploads").get_by_role("link")).to_be_visible()
    tab.page.wait_for_timeout(500)
    assert {"a.png", "b.jpg", "view.jpg"} <= {path.name for path in server.files()}
    tab.close()
    page = browser.new_page()
    for _ in range(40):
        if not server.files():
            break
        page.wait_for_timeout(250)
    assert server.files() == []
    page.goto(server.address)
    code, errors = server.end()
    page.close()
    assert code == 130
    assert "Traceback" not in errors
    assert list(server.uploads.glob("glass_page_*")) == []
