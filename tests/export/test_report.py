"""The parity report: every figure stands where it belongs, plots are to scale, and nothing from outside becomes markup."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pmclip_deploy.export.report import HEIGHT, WIDTH, Report, html_from_report
from pmclip_deploy.models import DEFAULT_BUNDLE

ANSWERS: dict[str, Any] = {
    "n": 2000,
    "images": 500,
    "data_sha256": "0d" * 32,
    "answered": 1500,
    "agreement": 0.99,
    "candidate_agreement": 0.98,
    "accuracy_fp32": 0.6335,
    "accuracy": 0.635,
    "difference": 0.0015,
    "difference_ci95": [-0.001, 0.0045],
    "mcnemar": {"only_this": 9, "only_other": 6, "p": 0.607},
    "by": {
        "type": {"closed": {"n": 120, "agreement": 0.96, "difference": -0.01, "difference_ci95": [-0.02, 0.0]}},
        "category": {"plane": {"n": 7, "agreement": None, "candidate_agreement": 1.0, "difference_ci95": None}},
    },
}
LAYERS = [
    {"layer": "blocks.1", "graph": "image", "effect": 0.001, "kept_float": False},
    {"layer": "stem", "graph": "image", "effect": None, "kept_float": True},
    {"layer": "blocks.0", "graph": "image", "effect": 0.004, "kept_float": True},
    {"layer": "word", "graph": "text", "effect": float("nan"), "kept_float": False},
]
HISTOGRAM = {"tensor": "x", "graph": "image", "counts": [1, 0, 7, 2], "edges": [-2, -1, 0, 1, 2], "range": [-1.0, 1.5], "method": "mse"}
REPORT = Report(
    title="Parity of tiny",
    parity={"tensors": {"image": {"n": 7, "cosine": 0.9975, "max_abs": 0.051, "rank": 3}, "text": {"n": 9}}, "answers": ANSWERS},
    gate="int8 passes",
    layers=LAYERS,
    effect="share of answers that change",
    histograms=[HISTOGRAM],
    speed={"image": 2.0, "text": 0.5, "head": None},
    about={"checkpoint sha256": "ab" * 32, "command": "pmclip-deploy export tiny"},
)


HOSTILE = "</code></td><script>alert('x')</script><img src=\"http://x/\" onload=y> & \x1b[2J\0\n\ud800\u202e"


def section(html: str, name: str) -> ElementTree.Element:
    """The page is well-formed XML too, which is stricter than HTML asks for and lets a test look inside."""
    (found,) = [s for s in ElementTree.fromstring(html).iter("section") if s.findtext("h2") == name]
    return found


def text(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def rows(element: ElementTree.Element) -> list[list[str]]:
    return [[text(cell) for cell in row] for row in element.iter("tr")]


def shapes(element: ElementTree.Element, tag: str, name: str) -> list[dict[str, str]]:
    return [e.attrib for e in element.iter(tag) if e.get("class") == name]


def test_every_figure_stands_in_its_row() -> None:
    html = html_from_report(REPORT)
    answers = rows(section(html, "Answers"))
    assert answers[0][1:5] == ["questions", "answered", "answers agree", "best candidates agree"]
    assert answers[1][:5] == ["all", "2,000", "1,500", "99.00%", "98.00%"]
    assert answers[2][:5] == ["type: closed", "120", "not measured", "96.00%", "not measured"]
    assert answers[3][:5] == ["category: plane", "7", "not measured", "not measured", "100.00%"]
    assert answers[5] == ["all", "0.6335", "0.6350", "+0.15", "-0.10 to +0.45", "", "9 : 6, p = 0.61"]
    assert answers[6] == ["type: closed", "not measured", "not measured", "-1.00", "-2.00 to +0.00", "", "not measured"]
    assert "2,000 questions about 500 images" in text(section(html, "Answers")) and "0d" * 32 in html
    assert rows(section(html, "Tensors")) == [
        ["", "rows", "least cosine", "largest difference", "rank"],
        ["image", "7", "0.99750", "0.051", "3"],
        ["text", "9", "not measured", "not measured", "not measured"],
    ]
    assert rows(section(html, "Provenance"))[1:] == [["checkpoint sha256", "ab" * 32], ["command", "pmclip-deploy export tiny"]]
    assert "Gate: int8 passes" in text(ElementTree.fromstring(html))


def test_layers_stand_by_effect_with_bars_to_scale_hollow_where_kept_in_float() -> None:
    layers = section(html_from_report(REPORT), "Layers")
    assert [row[:4] for row in rows(layers)[1:]] == [
        ["word", "text", "", "not finite"],
        ["blocks.0", "image", "float", "0.004"],
        ["blocks.1", "image", "", "0.001"],
        ["stem", "image", "float", "not measured"],
    ]
    assert [x["width"] for x in shapes(layers, "rect", "hollow")] == ["100.00%"]
    assert [x["width"] for x in shapes(layers, "rect", "bar")] == ["25.00%"]
    assert "2 of 4 layers are kept in float" in text(layers) and "share of answers that change" in text(layers)


def test_agreement_is_drawn_as_what_differs() -> None:
    agreement = next(section(html_from_report(REPORT), "Answers").iter("table"))
    assert "0 to 4.00%" in text(agreement)
    assert [x["width"] for x in shapes(agreement, "rect", "bar")] == ["25.00%", "100.00%"]  # all, closed; the plane's is not measured
    assert [x["width"] for x in shapes(agreement, "rect", "hollow")] == ["50.00%"]  # where all agree there is no bar


def test_intervals_are_on_one_scale_around_zero() -> None:
    accuracy = list(section(html_from_report(REPORT), "Answers").iter("table"))[1]
    assert "-2.00 to +2.00" in text(accuracy)
    assert [(x["x1"], x["x2"]) for x in shapes(accuracy, "line", "interval")] == [("47.60%", "60.80%"), ("2.00%", "50.00%")]
    assert [x["cx"] for x in shapes(accuracy, "circle", "bar")] == ["53.60%", "26.00%"]
    assert [x["x1"] for x in shapes(accuracy, "line", "limit")] == ["50%"] * 3


def test_speed_has_a_line_where_nothing_is_gained() -> None:
    speed = section(html_from_report(REPORT), "Speed")
    assert [row[:2] for row in rows(speed)[1:]] == [["image", "2.00"], ["text", "0.50"], ["head", "not measured"]]
    assert [x["width"] for x in shapes(speed, "rect", "bar")] == ["100.00%", "25.00%"]
    assert {x["x1"] for x in shapes(speed, "line", "limit")} == {"50.00%"}
    slow = section(html_from_report(replace(REPORT, speed={"text": 0.5})), "Speed")  # the line at 1 is on the scale even so
    assert [x["width"] for x in shapes(slow, "rect", "bar")] == ["50.00%"] and {x["x1"] for x in shapes(slow, "line", "limit")} == {
        "100.00%"
    }


def test_what_goes_in_stands_before_the_tensors() -> None:
    stages = {"pixels": {"n": 7, "max_abs": 0.0}, "tokens": {"n": 9, "equal": 8 / 9}, HOSTILE: {"n": 7, "max_abs": float("inf")}}
    tensors = section(html_from_report(replace(REPORT, parity={"stages": stages, "tensors": {}})), "Tensors")
    assert rows(tensors)[1:3] == [["pixels", "7", "largest difference 0"], ["tokens", "9", "88.89% are equal"]]
    assert rows(tensors)[3][1:] == ["7", "largest difference not finite"]


def test_an_overflow_is_measured_and_not_finite() -> None:
    parity = {
        "tensors": {"image": {"n": 7, "cosine": float("nan"), "max_abs": float("inf")}},
        "answers": {"n": 1, "difference": float("nan")},
    }
    html = html_from_report(replace(REPORT, parity=parity))
    assert rows(section(html, "Tensors"))[1] == ["image", "7", "not finite", "not finite"]
    assert rows(section(html, "Answers"))[3][3] == "not finite" and "NaN" not in html


def test_a_histogram_marks_its_range_and_what_lies_outside() -> None:
    ranges = section(html_from_report(REPORT), "Ranges")
    assert [x["d"] for x in shapes(ranges, "path", "limit")] == [f"M{WIDTH / 4:.1f} 0V{HEIGHT}", f"M{WIDTH * 7 / 8:.1f} 0V{HEIGHT}"]
    inside, outside = shapes(ranges, "path", "bar"), shapes(ranges, "path", "outside")
    assert [x["d"].split("V")[0] for x in outside] == ["M0.0 120"]
    assert [x["d"] for x in inside] == ["M170.0 120V0.0H255.0V120Z", "M255.0 120V56.6H340.0V120Z"]  # 1 - ln 3 / ln 8 of the height
    assert "range -1 to 1.5 (mse), at least 10.00% outside" in text(ranges)
    wide = section(html_from_report(replace(REPORT, histograms=[{**HISTOGRAM, "range": [-9, 9]}])), "Ranges")  # its lines stay on the plot
    assert [x["d"].split()[0] for x in shapes(wide, "path", "limit")] == ["M0.0", f"M{WIDTH:.1f}"]
    unquantised = section(html_from_report(replace(REPORT, histograms=[{**HISTOGRAM, "range": None}])), "Ranges")
    assert (
        not shapes(unquantised, "path", "limit")
        and not shapes(unquantised, "path", "outside")
        and "range: not measured" in text(unquantised)
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"counts": []},
        {"counts": None, "edges": None},
        {"counts": [0, 0, 0, 0]},
        {"counts": [1, 2, 3]},
        {"counts": [1, 2, 3, float("inf")]},
        {"edges": [0, 0, 0, 0, 0]},
    ],
)
def test_a_histogram_without_values_is_not_measured(broken: dict[str, Any]) -> None:
    ranges = section(html_from_report(replace(REPORT, histograms=[{**HISTOGRAM, **broken}])), "Ranges")
    assert text(next(ranges.iter("figure"))).startswith("not measured") and not list(ranges.iter("path"))


def test_what_is_missing_reads_not_measured() -> None:
    html = html_from_report(Report("empty", {"tensors": {}, "answers": None}))
    sections = list(ElementTree.fromstring(html).iter("section"))
    assert [s.findtext("h2") for s in sections] == ["Answers", "Tensors", "Layers", "Ranges", "Speed", "Provenance"]
    assert all(s.findtext("p") == "not measured" for s in sections) and "Gate:</strong> not measured" in html
    assert "Gate:" in html_from_report(Report("", {}))


def test_nothing_from_outside_becomes_markup_or_reaches_out() -> None:
    report = Report(
        title=HOSTILE,
        parity={
            "tensors": {HOSTILE: {HOSTILE: 1.0}},
            "answers": {**ANSWERS, "data_sha256": HOSTILE, "by": {HOSTILE: {HOSTILE: ANSWERS}}},
        },
        gate=HOSTILE,
        layers=[{**layer, "layer": HOSTILE, "graph": HOSTILE} for layer in LAYERS],
        effect=HOSTILE,
        histograms=[{**HISTOGRAM, "tensor": HOSTILE, "graph": HOSTILE, "method": HOSTILE}, {"tensor": HOSTILE, "graph": HOSTILE}],
        speed={HOSTILE: 1.0},
        about={HOSTILE: HOSTILE},
    )
    html = html_from_report(report)
    html.encode()  # a lone surrogate would not
    page = ElementTree.fromstring(html)
    tags = {e.tag for e in page.iter()}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
    assert tags == {e.tag for e in ElementTree.fromstring(html_from_report(REPORT)).iter()}
    attributes = {name for e in page.iter() for name in e.attrib}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "srcset")}
    assert "url(" not in html and "@import" not in html
    assert not any(c in html for c in "\x1b\0\u202e")
    assert text(page).count("alert('x')") >= 15
    policy = [e.get("content") for e in page.iter("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_same_report_gives_the_same_bytes_in_every_process() -> None:
    code = "import sys; sys.path.insert(0, {!r}); from test_report import *; print(html_from_report(REPORT), end='')"
    command = [sys.executable, "-c", code.format(str(Path(__file__).parent))]
    made = [subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert made[0] == made[1] == html_from_report(REPORT).encode()


def test_the_shipped_bundle_has_a_report() -> None:
    manifest = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text())
    html = html_from_report(Report(manifest["name"], manifest["parity"]))
    found = [row[0] for row in rows(section(html, "Tensors"))]
    findings = [f"findings/{output}" for output in ("finding", "region", "places")]
    assert [name for name in found if name] == ["what goes in", "pixels", "tokens", "image", "text", "head", *findings]
    assert rows(section(html, "Answers"))[1][0] == "all"
