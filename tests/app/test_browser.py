"""The page in a browser: Debian's Chromium, driven by Playwright, against the real server as a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from typing import IO, cast

import pytest

IS_REQUIRED = os.environ.get("HF_OPENTRANS_REQUIRE_BROWSER") == "1"
CHROMIUM = shutil.which("chromium")
EVIL = "<img src=x onerror=alert(1)>"
WAIT = 60_000  # milliseconds: a busy machine is no failure


def _missing():
    if find_spec("gradio") is None:
        return 'gradio is not installed: pip install "hf_opentrans[app]"'
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    return None if CHROMIUM else "Chromium is not installed: apt-get install chromium"


@pytest.fixture(scope="module", autouse=True)
def _needs():
    reason = _missing()
    if reason and IS_REQUIRED:
        pytest.fail(f"HF_OPENTRANS_REQUIRE_BROWSER is set. {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    """Start the server as a user does, and return its address."""
    command = [sys.executable, "-m", "hf_opentrans", "app", str(folders[0]), "--dense", str(folders[1])]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=written, text=True, cwd=log.parent
        )
    try:
        line = cast("IO[str]", process.stdout).readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"the server said {line!r}; {log.read_text()}"
        yield found[0]
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(20)
        cast("IO[str]", process.stdout).close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class _Visitor:
    """One visitor with a browser profile of its own."""

    def __init__(self, browser, address):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests, self.dialogs, self.address = [], [], address
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)
        self.page.wait_for_selector("#run")

    def upload(self, path):
        self.page.set_input_files("#upload input[type=file]", str(path))

    def segment(self, classes):
        self.page.fill("#classes textarea", classes)
        self.page.click("#run")

    def masks(self, side):
        """Return the addresses of one side's masks: they are made of what the files hold."""
        images = self.page.query_selector_all(f"#{side} img.mask")
        return [image.get_attribute("src").rpartition("/gradio/")[2] for image in images]

    def legend(self, side):
        found = re.findall(r"([^()]+?) \(\d+%\)", self.page.inner_text(f"#{side} .legend"))
        return [name.strip() for name in found]

    def wait_for(self, text, where="#figures"):
        self.page.wait_for_function(
            "([where, text]) => document.querySelector(where)?.innerText.includes(text)", arg=[where, text]
        )

    def wait_for_classes(self, side, names):
        """Wait until the legend shows some of these names and no others."""
        self.page.wait_for_function(
            """([side, names]) => {
                const text = document.querySelector(`#${side} .legend`)?.innerText ?? "";
                const found = [...text.matchAll(/([^()]+?) \\(\\d+%\\)/g)].map(each => each[1].trim());
                return found.length > 0 && found.every(each => names.includes(each));
            }""",
            arg=[side, names],
        )

    def wait_for_error(self, text):
        self.wait_for(text, ".toast-wrap")
        for button in self.page.query_selector_all(".toast-wrap button"):
            button.click()

    def close(self):
        self.context.close()


@pytest.fixture
def visit(browser, address):
    visitors = []

    def make():
        visitors.append(_Visitor(browser, address))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.close()


def _first_answer(visitor, picture, classes="cat; wall; sky"):
    visitor.page.fill("#classes textarea", classes)
    visitor.upload(picture)
    visitor.wait_for("of the pixels")
    visitor.segment(classes)


def test_classes_and_budget_change_what_is_shown(visit, picture):
    visitor = visit()
    assert visitor.masks("pruned") == []
    _first_answer(visitor, picture)
    visitor.wait_for("cat (", "#pruned")
    visitor.wait_for("Pruned, budget 0.6", "#pruned")
    dense, pruned = visitor.masks("reference"), visitor.masks("pruned")
    assert dense
    assert set(visitor.legend("pruned")) <= {"cat", "wall", "sky"}
    visitor.page.focus("#budget input[type=range]")
    visitor.page.keyboard.press("ArrowLeft")
    visitor.wait_for("Pruned, budget 0.4", "#pruned")
    visitor.wait_for("0.4")
    assert visitor.masks("reference") == dense
    assert visitor.masks("pruned") != pruned
    visitor.segment("dog; sofa, couch")
    visitor.wait_for("dog (", "#reference")
    assert set(visitor.legend("reference")) <= {"dog", "sofa"}
    assert visitor.masks("reference") != dense
    away = [url for url in visitor.requests if not url.startswith((visitor.address, "data:", "blob:"))]
    assert away == []


def test_bad_input_is_answered_and_the_server_stays_up(visit, picture, tmp_path, address):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    visitor = visit()
    visitor.upload(broken)
    visitor.wait_for_error("The file is not a picture that can be read. It must be one of JPEG")
    visitor.page.click("#upload button[aria-label='Remove Image'], #upload button[aria-label='Clear']")
    _first_answer(visitor, picture)
    visitor.segment("; ".join(f"name {i}" for i in range(500)))
    visitor.wait_for_error("There are 500 names. At most 200 are taken here")
    visitor.segment("")
    visitor.wait_for_error("There are no classes. At least one name is needed")
    visitor.segment("cat; dog; wall")
    visitor.wait_for("dog (", "#pruned")
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200


def test_html_in_a_label_is_text(visit, picture):
    visitor = visit()
    _first_answer(visitor, picture, f"{EVIL}; <b>bold</b>")
    visitor.wait_for("(", "#reference .legend")
    shown = visitor.page.inner_text("#reference .legend") + visitor.page.inner_text("#pruned .legend")
    assert EVIL in shown or "<b>bold</b>" in shown
    visitor.segment(f"{EVIL}; {EVIL}")
    visitor.wait_for_error(EVIL)
    assert visitor.page.query_selector_all("img[src=x], .legend b, .toast-wrap b") == []
    assert visitor.dialogs == []


def test_two_visitors_at_once_see_their_own(visit, picture):
    first, second = visit(), visit()
    for visitor in (first, second):
        visitor.upload(picture)
    second.page.focus("#budget input[type=range]")
    second.page.keyboard.press("ArrowRight")
    for _ in range(3):
        first.segment("wall; bed; door")
        second.segment("sofa; lamp")
        for side in ("reference", "pruned"):
            first.wait_for_classes(side, ["wall", "bed", "door"])
            second.wait_for_classes(side, ["sofa", "lamp"])
        first.wait_for("Pruned, budget 0.6", "#pruned")
        second.wait_for("Pruned, budget 0.8", "#pruned")
        assert first.masks("pruned") != second.masks("pruned")
