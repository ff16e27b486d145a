"""The page in Debian's Chromium and Firefox."""

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from pmclip_deploy.models import DEMO
from tests.serve.running import TOKEN, Running
from tests.tree import ROOT

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser with playwright")

BROWSERS = {"chromium": "chromium", "firefox": "firefox-esr"}
LEGS = [str(DEMO / f"leg-{number}.dcm") for number in (1, 2)]
FRACTURE = "is there a fracture?"


@pytest.fixture(scope="module", params=BROWSERS)
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    path = shutil.which(BROWSERS[request.param])
    if path is None:
        pytest.skip(f"{BROWSERS[request.param]} is not installed")
    with playwright.sync_playwright() as driver:
        of = {"channel": "moz-firefox"} if request.param == "firefox" else {"args": ["--no-sandbox"]}
        started = getattr(driver, request.param).launch(executable_path=path, timeout=120_000, **of)
        yield started
        started.close()


class Page:
    """A page of its own, and what it did that it must not do."""

    def __init__(self, browser: Any, service: Running) -> None:
        self.url, self.faults, self.asked = service.url, list[str](), list[str]()
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def until(self, expression: str) -> None:
        """Waits for it to hold; playwright's own way is eval, which the page's policy forbids."""
        end = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, (expression, self.faults)
            self.page.wait_for_timeout(20)

    def open(self) -> Any:
        self.page.goto(f"{self.url}#token={quote(TOKEN)}")
        self.until("document.getElementById('model').textContent.includes('pmclip-lite')")
        return self.page

    def give(self, *files: str | dict[str, Any]) -> None:
        self.page.set_input_files("#files", list(files))
        self.until("/\\d x \\d/.test(document.getElementById('status').textContent)")

    def ask(self, question: str) -> str:
        count = self.page.locator("article").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.until(f"document.querySelectorAll('article').length > {count}")
        return str(self.page.locator("article").first.inner_text())

    def gray(self) -> Any:
        """The gray levels that are painted, row by row."""
        painted = self.page.evaluate("import('/page/app.js').then((app) => Array.from(app.view.gray()))")
        return np.array(painted, np.int64)


@pytest.fixture
def page(browser: Any, service: Running) -> Iterator[Page]:
    made = Page(browser, service)
    made.open()
    yield made
    foreign = [url for url in made.asked if not url.startswith((service.url, "blob:", "data:"))]
    made.context.close()
    assert not made.faults and not foreign


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def test_a_question_is_answered_with_what_the_answer_is_worth(page: Page) -> None:
    page.give(LEGS[0])
    said = page.ask(FRACTURE)
    assert "yes" in said and "such answers were right" in said and "from the picture" in said
    assert "NO ANSWER" in page.ask("how old is the patient?") and "from the file's header" in page.ask("which organ?")
    page.page.get_by_role("button", name="Where it looked").click()
    assert page.page.locator("dialog[open] canvas").evaluate("(canvas) => canvas.width") == 320


def test_the_token_leaves_the_address_and_nothing_is_stored(page: Page) -> None:
    page.give(LEGS[0])
    assert TOKEN not in page.page.url and page.context.cookies() == []
    assert page.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert page.page.evaluate("indexedDB.databases().then((found) => found.length)") == 0


def test_without_a_token_the_page_asks_for_it(browser: Any, service: Running) -> None:
    made = Page(browser, service)
    made.page.goto(service.url)
    made.page.get_by_label("Token").fill(TOKEN)
    made.page.get_by_label("Token").press("Tab")
    made.until("document.getElementById('model').textContent.includes('pmclip-lite')")
    made.context.close()


def test_pixels_are_those_of_python(page: Page, shared: Path) -> None:
    """Of grayscale files: as they are shown, and after a drag, to one gray level."""
    from pmclip_deploy.errors import PmclipError
    from pmclip_deploy.imaging.read import picture_from_bytes

    compared, enough = 0, 4 if page.context.browser.browser_type.name == "chromium" else 1  # Firefox hands over pixels slowly
    for path in sorted((shared / "dicom").rglob("*")):
        if not path.is_file() or path.stat().st_size > 2 << 20:
            continue
        data = path.read_bytes()
        try:
            shown = picture_from_bytes("it", data)
        except PmclipError:
            continue
        if shown.pixels.ndim == 3 or shown.pixels.size > 1 << 20 or shown.info.window is None:
            continue
        page.page.goto("about:blank")
        page.open()
        page.give(_file("x", data))
        assert (page.gray() == shown.pixels.ravel()).all(), path.name
        box = page.page.locator("#view").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.page.mouse.move(x, y)
        page.page.mouse.down()
        page.page.mouse.move(x + 40, y - 25)
        page.page.mouse.up()
        window = page.page.evaluate("import('/page/app.js').then((app) => app.view.window)")
        assert window != list(shown.info.window), path.name
        dragged = picture_from_bytes("it", data, shown.info.frame, tuple(window)).pixels.ravel().astype(np.int64)
        assert np.abs(page.gray() - dragged).max() <= 1, path.name
        compared += 1
        if compared == enough:
            break
    assert compared == enough


def test_keys_alone(page: Page) -> None:
    page.give(LEGS[0])
    page.page.focus("#view")
    status = page.page.locator("#status")
    before = status.inner_text()
    page.page.keyboard.press("ArrowRight")
    assert status.inner_text() != before
    page.page.keyboard.press("r")
    assert status.inner_text() == before
    light = page.gray()
    page.page.keyboard.press("i")
    assert (page.gray() == 255 - light).all()
    page.page.keyboard.press("m")
    assert page.page.get_by_role("button", name="Measure").get_attribute("aria-pressed") == "true"
    for _ in range(40):  # every control is reached, in order, and none holds the focus
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.id") == "question":
            break
    page.page.keyboard.type(FRACTURE)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("article")


def test_the_ruler_uses_pixel_spacing(page: Page) -> None:
    from pydicom import dcmread

    dataset = dcmread(LEGS[0])
    dataset.PixelSpacing = [0.5, 0.25]
    out = io.BytesIO()
    dataset.save_as(out)
    page.give(_file("x", out.getvalue()))
    page.page.click("#measure")
    page.page.evaluate("import('/page/app.js').then(({ view }) => { view.line = [[10, 10], [50, 10]]; view.changed(); })")
    assert "10.0 mm" in page.page.locator("#status").inner_text()
    page.page.evaluate("import('/page/app.js').then(({ view }) => { view.line = [[10, 10], [10, 50]]; view.changed(); })")
    assert "20.0 mm" in page.page.locator("#status").inner_text()


def test_a_series_is_listed_in_anatomical_order(page: Page) -> None:
    from pydicom import dcmread

    files = []
    for place in (30, -10, 20, 0):
        dataset = dcmread(LEGS[0])
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, place], [1, 0, 0, 0, 1, 0]
        dataset.InstanceNumber = 1
        dataset.SeriesInstanceUID = "1.2.3"
        out = io.BytesIO()
        dataset.save_as(out)
        files.append(_file(f"{place}.dcm", out.getvalue()))
    page.give(*files)
    page.page.wait_for_selector("#list li:nth-child(4)")
    orders = page.page.evaluate("import('/page/app.js').then((app) => app.pictures.map((picture) => picture.about.order))")
    assert orders == [-10, 0, 20, 30]
    shown = "document.querySelector('#list [aria-current=true]')?.getAttribute('aria-label') === 'Picture {} of 4'"
    page.page.focus("#view")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("End")
    page.until(shown.format(4))
    page.page.locator("#view").hover()
    page.page.mouse.wheel(0, -100)
    page.until(shown.format(3))
    page.until("import('/page/app.js').then((app) => app.view.window !== null)")  # it stays within a series


def test_one_bad_file_among_good_ones(page: Page) -> None:
    first, second = (_file("a", Path(leg).read_bytes()) for leg in LEGS)
    page.give(first, _file("x.dcm", b"<html>"), second)
    page.page.wait_for_selector("#list li:nth-child(2)")
    page.until("document.getElementById('message').textContent.includes('1 of 3 files could not be read')")
    assert all("415" in fault for fault in page.faults)
    page.faults.clear()


def test_hostile_files_and_questions_give_one_message(page: Page) -> None:
    from tests.serve.test_hostile_files import QUICK

    said = {
        "nothing": "is empty",
        "HTML": "is not a DICOM",
        "a million frames": "its header lies",
        "a PNG bomb": "is broken",
        "cut at 1500": "cut short",
    }
    for name, words in said.items():
        page.page.set_input_files("#files", [_file("<img src=x onerror=alert(1)>.dcm", QUICK[name]())])
        page.until(f"document.getElementById('message').textContent.includes('{words}')")
        message = page.page.locator("#message").inner_text()
        assert message.startswith("This file") and "\n" not in message and page.page.locator("#message *").count() == 0
    page.page.fill("#question", FRACTURE)
    page.page.press("#question", "Enter")
    page.until("document.getElementById('message').textContent === 'Choose a picture first.'")
    for _ in range(2):  # the same file again
        page.give(LEGS[0])
    page.until("import('/page/app.js').then((app) => app.pictures.length === 2)")
    for question in ("<img src=x onerror=alert(1)>", "\u202e<script>alert(1)</script>", "\u9aa8\u6298"):
        assert "NO ANSWER" in page.ask(question) and page.page.locator("article img, article script").count() == 0
    assert "yes" in page.ask(FRACTURE)
    assert all("status of 4" in fault for fault in page.faults)
    page.faults.clear()


def test_no_name_is_shown_unless_it_is_switched_on(page: Page) -> None:
    from pydicom import dcmread

    from tests.patient import PATIENT

    dataset = dcmread(LEGS[0])
    dataset.PatientName, dataset.PatientID = PATIENT["PatientName"], PATIENT["PatientID"]
    out = io.BytesIO()
    dataset.save_as(out)
    page.give(_file("ZQXFILE.dcm", out.getvalue()))
    page.ask(FRACTURE)
    assert "ZQX" not in page.page.content()
    page.page.check("#name-switch")
    page.until("document.getElementById('name').textContent.includes('ZQXNAME')")
    page.page.uncheck("#name-switch")
    page.until("!document.documentElement.outerHTML.includes('ZQX')")


def test_forget_all(page: Page, service: Running) -> None:
    page.give(LEGS[0])
    page.ask(FRACTURE)
    page.page.click("#forget")
    page.until("document.querySelectorAll('article').length === 0")
    assert "pmclip_images 0.0" in service.client.get("/metrics").text
    page.give(LEGS[1])  # and goes on


def test_accessibility(page: Page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="checks with axe-core")
    for prepare in (lambda: None, lambda: (page.give(*LEGS), page.ask(FRACTURE), page.ask("how old is the patient?"))):
        prepare()
        found = axe.Axe().run(page.page)
        assert found.violations_count == 0, found.generate_report()


def test_no_script_from_elsewhere_and_no_build_step() -> None:
    folder = ROOT / "pmclip_deploy" / "serve" / "page"
    for path in folder.iterdir():
        text = path.read_text()
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text, path.name
        assert "<script>" not in text and " onclick" not in text and "eval(" not in text, path.name
