"""The tables of trust.py from its rows: every bundle that was measured, the oldest first. The same rows give the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.results import Row
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.export.page import NOT_MEASURED, is_number, one_line

START, END = "<!-- from the rows: do not edit by hand -->", "<!-- end of the rows -->"
GLANCE_START = "<!-- at a glance, from the rows: do not edit by hand -->"  # in a page that shows the first table alone
FIRST = "pmclip-deploy/answer/1"  # the form of the answers that the oldest rows are about
Place = tuple[str, str]  # part ("section: what is asked"), pictures

FRACTURE, NORMAL, CONSISTENCY = "findings: is there a fracture?", "normality: is this a normal x-ray?", "consistency: "
ALL, VAL, NAMED = "FracAtlas, all", "VQA-Med 2019 val", "VQA-Med 2019 val, a named abnormality"
WRONG, BOTH, OTHER = 'wrong "normal" among given', "yes to both, of both answered", "another answer, of given"
MODALITY = "header: what imaging modality is shown?"
BORDER = "robustness: black border of 60%: organ"
REGIONS = ("hand", "leg", "hip", "shoulder")
CHANGES = ("black border of 25%", "turned by 90 degrees", "half size", "crop of 10%", "JPEG quality 50")

# What stands in the table at the top: words, part, pictures, figure, what is required, what is aimed at.
GLANCE: Sequence[tuple[str, str, str, str, str, str]] = (
    ('"is there a fracture?": AUROC', FRACTURE, ALL, "AUROC", "0.90", "0.93"),
    *((f"... {region}: AUROC", FRACTURE, f"FracAtlas, {region}", "AUROC", "0.85", "0.90") for region in REGIONS),
    ("... sensitivity at specificity 0.90", FRACTURE, ALL, "sensitivity at specificity 0.90", "0.65", "0.75"),
    ("... yes where there is one", FRACTURE, ALL, "yes where it is", "", ""),
    ("... yes where there is none", FRACTURE, ALL, "yes where it is not", "", ""),
    ("... AUROC of picture size alone", FRACTURE, ALL, "AUROC of picture size alone", "", ""),
    ("... AUROC of region tags alone", FRACTURE, ALL, "AUROC of region tags alone", "", ""),
    ('"is there pneumonia?" on children: AUROC', "findings: is there pneumonia?", "Kermany", "AUROC", "0.95", "0.98"),
    ('"is this a normal x-ray?": wrong "normal" among given', NORMAL, NAMED, WRONG, "10% or withheld", "5% or withheld"),
    ('"is there an abnormality?": wrong no among given', "normality: is there an abnormality?", NAMED, WRONG, "", ""),
    ("fracture yes and bone intact yes", f"{CONSISTENCY}is the bone intact?", ALL, BOTH, "none", "none"),
    ("fracture yes and normal yes", f"{CONSISTENCY}is this a normal x-ray?", ALL, BOTH, "none", "none"),
    ('"rib fracture?" answered on hands, legs, hips, shoulders', f"{CONSISTENCY}rib fracture?", ALL, "answered", "", ""),
    ('"is this a chest x-ray?": yes on hands', "body part: is this a chest x-ray?", "FracAtlas, hands", "yes", "", ""),
    ('"is this a chest image?": yes on chests', "body part: is this a chest image?", "Kermany, chests", "yes", "", ""),
    ("DICOM files: the modality contradicts the header", MODALITY, "DICOM files, all", "contradict the header, of answered", "", ""),
    ("... and nothing says so", MODALITY, "DICOM files, all", "... and nothing says so", "none", "none"),
    ("answers with a confidence under 0.5", "confidence: all kinds", VAL, "under 0.5, of answered", "", ""),
    ("... right of these", "confidence: all kinds", VAL, "... right of these", "", ""),
    ("no radiology: turned away", "no radiology: turned away", "all", "no question answered", "97%", "99%"),
    ("radiology: turned away", "radiology: turned away", "all sets", "turned away", "1%", "0.5%"),
    *(
        (f"... {pictures}, XR, CT, MR and US", "radiology: turned away", f"{pictures}, XR, CT, MR and US", "turned away", "1%", "0.5%")
        for pictures in (VAL, "SLAKE")
    ),
    *(
        (f"{change}: another {kind}", f"robustness: {change}: {kind}", VAL, OTHER, "a third of the first", "a tenth of the first")
        for kind in ("modality family", "modality in detail")
        for change in CHANGES
    ),
    ("organ: accuracy", BORDER, VAL, "accuracy before", "", ""),
    ("... with a black border of 60%", BORDER, VAL, "accuracy after", "", ""),
)


def render(rows: Iterable[Row], page: Path | None) -> None:
    """Writes the tables, or the first one, between the marks of a page, or prints them. Raises UsageError where the page has no marks."""
    if page is None:
        print(markdown(rows))
        return
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{page}: cannot be read", f"give a Markdown file with the line {START}") from None
    mark, made = (GLANCE_START, at_a_glance) if GLANCE_START in text else (START, markdown)
    before, start, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UsageError(f"{page}: the lines {START} and {END} are not there", "write them where the tables belong")
    page.write_text(f"{before}{mark}\n\n{made(rows)}\n{END}{after}", encoding="utf-8")


def at_a_glance(rows: Iterable[Row], limited: bool = False) -> str:
    """GLANCE, a column for each bundle."""
    used = _used(rows, limited)
    newest = {(row["part"], row["scenario"], _bundle(row)): row for row in used}
    bundles = list(dict.fromkeys(map(_bundle, used)))

    def cells(part: str, pictures: str, figure: str) -> list[str]:
        found = [newest.get((part, pictures, bundle)) for bundle in bundles]
        return [NOT_MEASURED if row is None else _cell(row["figures"].get(figure)) for row in found]

    body = [[words, *cells(part, pictures, figure), low, aim] for words, part, pictures, figure, low, aim in GLANCE]
    return _table(["measured", *bundles, "required", "aim"], body)


def _used(rows: Iterable[Row], limited: bool) -> list[Row]:
    """The oldest first."""
    return sorted((row for row in rows if limited or row["environment"].get("limit") is None), key=lambda row: row["time"])


def markdown(rows: Iterable[Row], limited: bool = False) -> str:
    """``limited`` takes the rows of runs with --limit too."""
    used = _used(rows, limited)
    sections: dict[str, dict[Place, dict[str, Row]]] = {}  # section -> place -> bundle -> its newest row
    for row in used:
        sections.setdefault(row["part"].partition(": ")[0], {}).setdefault((row["part"], row["scenario"]), {})[_bundle(row)] = row
    out = f"## At a glance\n\n{at_a_glance(used, limited=True)}"
    for name, section in sections.items():
        out += f"\n## {name.capitalize()}\n\n" + _section(section)
    commands = dict.fromkeys((_bundle(row), row["command"], row["time"][:10]) for row in used)
    return f"{out}\n## Commands\n\n" + "".join(f"- {bundle}: `{one_line(command)}` ({day})\n" for bundle, command, day in commands)


def _section(section: Mapping[Place, Mapping[str, Row]]) -> str:
    """A line for each place and bundle, a column for each figure that any of them has."""
    figures = list(dict.fromkeys(name for of in section.values() for row in of.values() for name in row["figures"]))
    body = []
    for (part, pictures), of in section.items():
        for bundle, row in of.items():
            missing = [f"{NOT_MEASURED}: {row['not_measured']}"] + [""] * (len(figures) - 1)
            cells = [_cell(row["figures"][name]) if name in row["figures"] else "" for name in figures]
            body.append([part.partition(": ")[2], pictures, bundle, *(missing if row["not_measured"] else cells)])
    return _table(["asked or changed", "pictures", "bundle", *figures], body)


def _bundle(row: Row) -> str:
    about = row["environment"].get("bundle") or {}
    folds, schema = about.get("folds", 1), str(row["environment"].get("answers", FIRST)).partition("/")[2]
    rules = "" if schema == FIRST.partition("/")[2] else f", {schema}"  # the same bundle answers otherwise by other rules
    return f"{about.get('name')} {about.get('version')} {str(about.get('sha256'))[:8]}{rules}{f', {folds} folds' if folds > 1 else ''}"


def _cell(figure: Mapping[str, Any] | None) -> str:
    """A share as 5.0% [1.7, 13.7], 3 of 60; anything else as 0.446 [0.410, 0.480], n 1,104."""
    if figure is None:
        return NOT_MEASURED
    value, n, of, interval = (figure.get(key) for key in ("value", "n", "of", "ci95"))
    if value is True:
        return "yes"
    if not is_number(value):
        return f"{NOT_MEASURED}: {'one class' if n else 'no score'}" if of is None else "none"
    if of is None:
        return f"{value:.3f}{f' [{interval[0]:.3f}, {interval[1]:.3f}]' if interval else ''}, n {n:,}"
    return f"{value:.1%}{f' [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]' if interval else ''}, {of:,} of {n:,}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(one_line(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |\n"

    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(map(line, body))
