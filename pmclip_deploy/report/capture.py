"""The answers as a page, a Secondary Capture: for archives and viewers that take no Structured Report. No pixel of the image is on it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import TYPE_CHECKING

from pmclip_deploy.answer import Answer
from pmclip_deploy.report import texts
from pmclip_deploy.report.document import finish, new_document, reference, sources_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from pydicom import Dataset

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SERIES = 9902
WIDTH, MARGIN, SIZE = 1024, 40, 22  # pixels
MOST_LINES = 2000  # 60,000 pixels, of the 65,535 that Rows can say


def capture_from_answers(dataset: Dataset, answers: Sequence[Answer], *, prevalence: float | None = None) -> Dataset:
    """A Secondary Capture (PS3.3 A.8.1), MONOCHROME2 with 8 bits, 1024 wide. Takes and raises what ``report_from_answers`` does.

    Burned In Annotation is YES: a question is free text, and may name somebody.
    """
    return capture_from_images([(dataset, answers)], prevalence=prevalence)


def capture_from_images(
    images: Sequence[tuple[Dataset, Sequence[Answer]]], *, prevalence: float | None = None, notes: Sequence[str] = ()
) -> Dataset:
    """One page about several images of a study, each with its answers, and with ``notes`` at its end."""
    from pydicom import Dataset

    parts = sources_of(images)
    source, answers = parts[0]
    page = new_document(SECONDARY_CAPTURE, "OT", SERIES, source, answers)
    page.ImageType, page.ConversionType, page.BurnedInAnnotation = ["DERIVED", "SECONDARY"], "WSD", "YES"
    page.PatientOrientation = page.Laterality = ""  # type 2C: a page shows no side
    page.DerivationDescription = "A page of questions and answers about the source image"
    page.SecondaryCaptureDeviceManufacturer = page.Manufacturer
    page.SecondaryCaptureDeviceManufacturerModelName = page.ManufacturerModelName
    page.SourceImageSequence = []
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "121322", "DCM", "Source image for image processing operation"
    for image, about in parts:
        of = reference(image)
        of.PurposeOfReferenceCodeSequence = [purpose]
        if (frame := image.frame_number(about[0].image)) is not None:
            of.ReferencedFrameNumber = frame
        page.SourceImageSequence.append(of)
    told, noted = texts.told(parts, prevalence, notes)
    drawn = page_of([texts.banner(answers[0].model), *(text for _, text in told), *noted])
    page.SamplesPerPixel, page.PhotometricInterpretation, page.PixelRepresentation = 1, "MONOCHROME2", 0
    page.Columns, page.Rows = drawn.size
    page.BitsAllocated, page.BitsStored, page.HighBit = 8, 8, 7
    page.PixelData = drawn.tobytes()
    page["PixelData"].VR = "OB"
    finish(page, source)
    return page


def page_of(paragraphs: Sequence[str]) -> Image:
    """Black on white, mode "L". What is beyond MOST_LINES is left out, and the last line says so."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(SIZE)  # within Pillow; letters that it lacks become boxes
    lines = list(islice((line for paragraph in paragraphs for line in chain(_wrapped(paragraph, font), [""])), MOST_LINES + 1))
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "The page ends here; the Structured Report has the rest."]
    height = SIZE * 4 // 3
    page = Image.new("L", (WIDTH, (2 * MARGIN + height * len(lines)) // 2 * 2), 255)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * height), line, fill=0, font=font)
    return page


def _wrapped(text: str, font: FreeTypeFont | ImageFont) -> Iterator[str]:
    """Lines that are narrow enough, broken at spaces, and within a word that is longer than a line."""
    line, width = "", WIDTH - 2 * MARGIN

    def is_wide(text: str) -> bool:
        return len(text) > width or font.getlength(text) > width  # no letter is narrower than a pixel

    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if not is_wide(joined):
            line = joined
            continue
        if line:
            yield line
        while is_wide(word):
            fits = bisect_right(range(2, width), width, key=partial(_length, font, word)) + 1
            yield word[:fits]
            word = word[fits:]
        line = word
    yield line


def _length(font: FreeTypeFont | ImageFont, word: str, letters: int) -> int:
    return ceil(font.getlength(word[:letters]))
