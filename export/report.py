"""A parity report: one HTML page of figures, bars and histograms that needs nothing but itself, on a screen or on paper.

The plots are SVG written here: bars in the rows of a table and steps of a histogram are less code than matplotlib's settings, their bytes
change with no library's version, and browsers print them, while they leave out the backgrounds of HTML.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmclip_deploy.export.page import NOT_MEASURED, bar, finite, is_number, largest, line, missing, number, page, percent, svg, table, text

WIDTH, HEIGHT = 340, 120  # of a histogram, in pixels

Figures = Mapping[str, Any]
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]  # a figure's key to its heading and how its value is written


@dataclass(frozen=True)
class Report:
    """What a page shows, as plain data. What is missing, None or empty reads "not measured", NaN and infinity "not finite"."""

    title: str
    parity: Figures  # export/parity.py's: {"stages": ..., "tensors": {graph: {figure: number}}, "answers": {...} or None}
    gate: str | None = None  # what the gate said, in one line
    layers: Sequence[Figures] = ()  # {"layer": str, "graph": str, "effect": float, "kept_float": bool}, in any order
    effect: str = "effect"  # what a layer's effect is, in words, with its unit
    # {"tensor": str, "graph": str, "counts": [N], "edges": [N + 1], "range": [low, high] or None, "method": str or None}
    histograms: Sequence[Figures] = ()
    speed: Figures | None = None  # graph to how many times as fast as onnxruntime's fp32 it runs
    about: Mapping[str, str] = field(default_factory=dict)  # hashes, versions, the command; shown in this order


def html_from_report(report: Report) -> str:
    """The whole page, to be stored as UTF-8. The same report gives the same bytes."""
    tensors, answers = report.parity.get("tensors") or {}, report.parity.get("answers") or {}
    sections = {
        "Answers": _answers(answers),
        **({"Labels": _labels(labels)} if (labels := report.parity.get("labels")) else {}),
        **({"Findings": _findings(findings)} if (findings := report.parity.get("findings")) else {}),
        "Tensors": _stages(report.parity.get("stages") or {}) + _tensors(tensors),
        "Layers": _layers(report.layers, report.effect),
        "Ranges": _histograms(report.histograms),
        "Speed": _speed(report.speed or {}),
        "Provenance": table(["", ""], [[text(key), f"<code>{text(value)}</code>"] for key, value in report.about.items()], left=2),
    }
    gate = f"<p><strong>Gate:</strong> {NOT_MEASURED if report.gate is None else text(report.gate)}</p>"
    return page(report.title, gate, sections)


def _labels(labels: Figures) -> str:
    return table(["pictures", "get the same label as in fp32"], [[str(labels["n"]), percent(labels["agreement"])]])


def _answers(answers: Figures) -> str:
    if not answers:
        return ""
    groups = [("all", answers), *((f"{what}: {name}", of) for what, by in (answers.get("by") or {}).items() for name, of in by.items())]
    differ = [tuple(1 - x if finite(x := of.get(key)) else None for key in ("agreement", "candidate_agreement")) for _, of in groups]
    most = largest(x for pair in differ for x in pair)
    agreement = table(
        ["", *(heading for heading, _ in AGREEMENT.values()), f"share that differs, 0 to {percent(most)}"],
        [
            [text(name), *_cells(of, AGREEMENT), svg(bar(said, most, "20%", "30%") + bar(best, most, "55%", "30%", hollow=True))]
            for (name, of), (said, best) in zip(groups, differ, strict=True)
        ],
    )
    bounds = [(of.get("difference"), *(of.get("difference_ci95") or (None, None))) for _, of in groups]
    widest = largest(abs(x) for interval in bounds for x in interval if finite(x))
    accuracy = table(
        ["", *(heading for heading, _ in ACCURACY.values()), f"-{_points(widest)[1:]} to {_points(widest)}", "only one is right"],
        [
            [text(name), *_cells(of, ACCURACY), svg(_interval(interval, widest)), _mcnemar(of.get("mcnemar"))]
            for (name, of), interval in zip(groups, bounds, strict=True)
        ],
    )
    return (
        f"<p>{number(answers.get('n'))} questions about {number(answers.get('images'))} images, "
        f"sha256 of the rows <code>{text(answers.get('data_sha256', NOT_MEASURED))}</code>.</p>"
        "<h3>How often the bundle and the reference say the same</h3>"
        "<p>Answers: over the rows that at least one of the two answers (filled bar). Best candidates: over all rows, abstained or not "
        f"(hollow bar).</p>{agreement}"
        "<h3>How often they are right</h3>"
        "<p>Accuracy of the best candidates, and the bundle's less the reference's, in percentage points, with a paired 95% interval. "
        "The last column counts the rows that only the bundle and only the reference gets right, with McNemar's exact p, which takes rows "
        f"for independent; those of one image are not, so where the two disagree, the interval is right.</p>{accuracy}"
    )


def _stages(stages: Figures) -> str:
    """What goes into the graphs, which both sides make for themselves."""

    def said(of: Figures) -> str:
        return f"{percent(of['equal'])} are equal" if "equal" in of else f"largest difference {number(of.get('max_abs'))}"

    rows = [[text(name), number(of.get("n")), said(of)] for name, of in stages.items()]
    return table(["what goes in", "rows", "bundle and reference"], rows)


def _findings(findings: Figures) -> str:
    headings = ["pictures", "decisions where the region is seen", "on the same side as fp32", "differ, and no near-tie"]
    return table(
        headings, [[number(findings["n"]), number(findings["decisions"]), percent(findings["agreement"]), number(findings["crossed"])]]
    )


def _tensors(tensors: Figures) -> str:
    keys = dict.fromkeys(key for of in tensors.values() for key in of)
    columns = {key: TENSORS.get(key, (key, number)) for key in keys}
    return table(["", *(heading for heading, _ in columns.values())], [[text(name), *_cells(of, columns)] for name, of in tensors.items()])


def _layers(layers: Sequence[Figures], effect: str) -> str:
    if not layers:
        return ""
    ordered = sorted(layers, key=lambda layer: _rank(layer.get("effect")))
    most = largest(layer.get("effect") for layer in layers)
    kept = sum(bool(layer.get("kept_float")) for layer in layers)
    return f"<p>{number(kept)} of {number(len(layers))} layers are kept in float (hollow bars). Bar: {text(effect)}.</p>" + table(
        ["layer", "graph", "", "effect", f"0 to {number(most)}"],
        [
            [
                f"<code>{text(layer.get('layer'))}</code>",
                text(layer.get("graph", "")),
                "float" if layer.get("kept_float") else "",
                number(value := layer.get("effect")),
                svg(bar(value, most, hollow=bool(layer.get("kept_float")))),
            ]
            for layer in ordered
        ],
        left=3,
    )


def _rank(effect: Any) -> float:
    """The largest first, before it what is not finite, after it what was not measured."""
    return math.inf if not is_number(effect) else -effect if finite(effect) else -math.inf


def _histograms(histograms: Sequence[Figures]) -> str:
    if not histograms:
        return ""
    return (
        "<p>How often a value occurs, on a logarithmic scale. Dashed lines: the range that is represented; what lies outside (dark) is "
        f'moved to its ends.</p><div class="grid">{"".join(map(_histogram, histograms))}</div>'
    )


def _histogram(h: Figures) -> str:
    counts, edges = h.get("counts") or [], h.get("edges") or []
    name = f"<code>{text(h.get('graph', ''))} {text(h.get('tensor', ''))}</code>"
    if len(edges) != len(counts) + 1 or not all(map(finite, [*counts, *edges])) or not sum(counts) or edges[0] >= edges[-1]:
        return f"<figure>{missing()}<figcaption>{name}</figcaption></figure>"
    first, last = edges[0], edges[-1]
    low, high = h.get("range") or (None, None)
    chosen = finite(low) and finite(high)

    def x(value: float) -> str:
        return f"{WIDTH * (value - first) / (last - first):.1f}"

    bins = list(zip(counts, edges, edges[1:], strict=False))
    outside = [chosen and (right <= low or left >= high) for _, left, right in bins]
    bars = "".join(
        f'<path class="{"outside" if out else "bar"}" d="M{x(left)} {HEIGHT}V{HEIGHT * (1 - math.log1p(n) / math.log1p(max(counts))):.1f}'
        f'H{x(right)}V{HEIGHT}Z"/>'
        for (n, left, right), out in zip(bins, outside, strict=True)
        if n > 0
    )
    lines = "".join(f'<path class="limit" d="M{x(min(max(v, first), last))} 0V{HEIGHT}"/>' for v in ((low, high) if chosen else ()))
    lost = sum(n for (n, _, _), out in zip(bins, outside, strict=True) if out) / sum(counts)
    method = f" ({text(h['method'])})" if h.get("method") else ""
    caption = f"range {number(low)} to {number(high)}{method}, at least {percent(lost)} outside" if chosen else f"range: {NOT_MEASURED}"
    return (
        f'<figure><svg viewBox="-1 -1 {WIDTH + 2} {HEIGHT + 16}">{bars}{lines}<path class="axis" d="M0 {HEIGHT}H{WIDTH}"/>'
        f'<text y="{HEIGHT + 12}">{number(first)}</text><text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end">{number(last)}</text></svg>'
        f"<figcaption>{name}<br/>{caption}</figcaption></figure>"
    )


def _speed(speed: Figures) -> str:
    if not speed:
        return ""
    most = max(largest(speed.values()), 1.0)
    return "<p>How many times as fast as fp32 in onnxruntime, on the machine that wrote this page. Dashed line: as fast.</p>" + table(
        ["", "times", f"0 to {number(most, '.3g')}"],
        [[text(name), number(value, ".2f"), svg(bar(value, most) + line(f"{100 / most:.2f}%"))] for name, value in speed.items()],
    )


def _cells(figures: Figures, columns: Columns) -> list[str]:
    return [write(figures.get(key)) for key, (_, write) in columns.items()]


def _mcnemar(test: Figures | None) -> str:
    if not test:
        return NOT_MEASURED
    return f"{number(test.get('only_this'))} : {number(test.get('only_other'))}, p = {number(test.get('p'), '.2g')}"


def _interval(interval: Sequence[Any], widest: float) -> str:
    """On a scale from minus ``widest`` to ``widest``: a line at zero, (value, low, high) as a dot in its interval."""
    middle, low, high = interval

    def x(value: float) -> str:
        return f"{50 + 48 * value / widest:.2f}%"

    ends = f'<line class="interval" x1="{x(low)}" x2="{x(high)}" y1="50%" y2="50%"/>' if finite(low) and finite(high) else ""
    return line("50%") + ends + (f'<circle class="bar" cx="{x(middle)}" cy="50%" r="4"/>' if finite(middle) else "")


def _points(value: Any) -> str:
    return number(100 * value, "+.2f") if is_number(value) else NOT_MEASURED


def _points_interval(value: Any) -> str:
    return f"{_points(value[0])} to {_points(value[1])}" if value else NOT_MEASURED


def _fixed(digits: int) -> Callable[[Any], str]:
    return lambda value: number(value, f".{digits}f")


AGREEMENT: Columns = {
    "n": ("questions", number),
    "answered": ("answered", number),
    "agreement": ("answers agree", percent),
    "candidate_agreement": ("best candidates agree", percent),
}
ACCURACY: Columns = {
    "accuracy_fp32": ("reference, fp32", _fixed(4)),
    "accuracy": ("bundle", _fixed(4)),
    "difference": ("difference", _points),
    "difference_ci95": ("95% interval", _points_interval),
}
TENSORS: Columns = {
    "n": ("rows", number),
    "cosine": ("least cosine", _fixed(5)),
    "cosine_mean": ("mean cosine", _fixed(5)),
    "max_abs": ("largest difference", number),
    "largest": ("largest value", number),
}
