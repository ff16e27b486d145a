"""Take the screenshots of docs/howto/serve.md with Chromium: `python docs/_ext/screenshots.py`. Needs the extras `ward` and `dev`."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
from playwright.sync_api import Page, sync_playwright
from pydicom import dcmread
from pydicom.data import get_testdata_file

from pmclip_deploy.models import DEMO

HERE = Path(__file__).parents[1] / "howto"
START = [sys.executable, "-c", "from pmclip_deploy.cli.app import program; program()", "serve", "--port", "0"]
COLORS = 32


def series() -> list[dict[str, Any]]:
    """The CT of pydicom six times, at other places of the patient and brighter from place to place."""
    files = []
    for index in range(6):
        dataset, out = dcmread(str(get_testdata_file("CT_small.dcm", download=False))), io.BytesIO()
        dataset.ImagePositionPatient[2] = 5 * index
        dataset.RescaleIntercept = -1024 + 40 * index
        dataset.save_as(out)
        files.append({"name": f"{index}.dcm", "mimeType": "application/dicom", "buffer": out.getvalue()})
    return files


def take(page: Page, files: list[Any], question: str, name: str) -> None:
    page.set_input_files("#files", files)
    page.wait_for_selector("#tools:not([hidden])")
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("article")
    page.wait_for_timeout(1500)  # until the thumbnails are drawn
    drawn = PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS, dither=PIL.Image.Dither.NONE)
    drawn.save(HERE / f"{name}.png", optimize=True)
    page.click("#forget")


def main() -> None:
    service = subprocess.Popen(START, stderr=subprocess.PIPE, text=True)
    try:
        address = next(found[1] for line in service.stderr or () if (found := re.search(r"Open (\S+)", line)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 620})
            page.goto(address)
            take(page, [str(DEMO / "leg-1.dcm")], "is there a fracture?", "serve-answer")
            take(page, series(), "in what plane is this image taken?", "serve-series")
            browser.close()
    finally:
        service.terminate()


if __name__ == "__main__":
    main()
