"""A parity report: one HTML page of figures, bars and histograms that needs nothing but itself, on a screen or on paper.

The plots are SVG written here: bars in the rows of a table and steps of a histogram are less code than matplotlib's settings, their bytes
change with no library's version, and browsers print them, while they leave out the backgrounds of HTML.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from numbers import Real
from typing import Any

NOT_MEASURED = "not measured"
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
        "Tensors": _stages(report.parity.get("stages") or {}) + _tensors(tensors),
        "Layers": _layers(report.layers, report.effect),
        "Ranges": _histograms(report.histograms),
        "Speed": _speed(report.speed or {}),
        "Provenance": _table(["", ""], [[_text(key), f"<code>{_text(value)}</code>"] for key, value in report.about.items()], left=2),
    }
    body = "".join(f"<section><h2>{name}</h2>{content or _missing()}</section>\n" for name, content in sections.items())
    gate = f"<p><strong>Gate:</strong> {NOT_MEASURED if report.gate is None else _text(report.gate)}</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{_text(report.title)}</title>\n'
        # Nothing is fetched and no script runs, whatever a name in here might hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
        f'<meta name="viewport" content="width=device-width"/>\n<style>{STYLE}</style></head><body>\n'
        f"<h1>{_text(report.title)}</h1>{gate}\n{body}<footer>Research use only; not a medical device.</footer></body></html>\n"
    )


def _labels(labels: Figures) -> str:
    return _table(["pictures", "get the same label as in fp32"], [[str(labels["n"]), _percent(labels["agreement"])]])


def _answers(answers: Figures) -> str:
    if not answers:
        return ""
    groups = [("all", answers), *((f"{what}: {name}", of) for what, by in (answers.get("by") or {}).items() for name, of in by.items())]
    differ = [tuple(1 - x if _finite(x := of.get(key)) else None for key in ("agreement", "candidate_agreement")) for _, of in groups]
    most = _largest(x for pair in differ for x in pair)
    agreement = _table(
        ["", *(heading for heading, _ in AGREEMENT.values()), f"share that differs, 0 to {_percent(most)}"],
        [
            [_text(name), *_cells(of, AGREEMENT), _svg(_bar(said, most, "20%", "30%") + _bar(best, most, "55%", "30%", hollow=True))]
            for (name, of), (said, best) in zip(groups, differ, strict=True)
        ],
    )
    bounds = [(of.get("difference"), *(of.get("difference_ci95") or (None, None))) for _, of in groups]
    widest = _largest(abs(x) for interval in bounds for x in interval if _finite(x))
    accuracy = _table(
        ["", *(heading for heading, _ in ACCURACY.values()), f"-{_points(widest)[1:]} to {_points(widest)}", "only one is right"],
        [
            [_text(name), *_cells(of, ACCURACY), _svg(_interval(interval, widest)), _mcnemar(of.get("mcnemar"))]
            for (name, of), interval in zip(groups, bounds, strict=True)
        ],
    )
    return (
        f"<p>{_number(answers.get('n'))} questions about {_number(answers.get('images'))} images, "
        f"sha256 of the rows <code>{_text(answers.get('data_sha256', NOT_MEASURED))}</code>.</p>"
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
        return f"{_percent(of['equal'])} are equal" if "equal" in of else f"largest difference {_number(of.get('max_abs'))}"

    rows = [[_text(name), _number(of.get("n")), said(of)] for name, of in stages.items()]
    return _table(["what goes in", "rows", "bundle and reference"], rows)


def _tensors(tensors: Figures) -> str:
    keys = dict.fromkeys(key for of in tensors.values() for key in of)
    columns = {key: TENSORS.get(key, (key, _number)) for key in keys}
    return _table(
        ["", *(heading for heading, _ in columns.values())], [[_text(name), *_cells(of, columns)] for name, of in tensors.items()]
    )


def _layers(layers: Sequence[Figures], effect: str) -> str:
    if not layers:
        return ""
    ordered = sorted(layers, key=lambda layer: _rank(layer.get("effect")))
    most = _largest(layer.get("effect") for layer in layers)
    kept = sum(bool(layer.get("kept_float")) for layer in layers)
    return f"<p>{_number(kept)} of {_number(len(layers))} layers are kept in float (hollow bars). Bar: {_text(effect)}.</p>" + _table(
        ["layer", "graph", "", "effect", f"0 to {_number(most)}"],
        [
            [
                f"<code>{_text(layer.get('layer'))}</code>",
                _text(layer.get("graph", "")),
                "float" if layer.get("kept_float") else "",
                _number(value := layer.get("effect")),
                _svg(_bar(value, most, hollow=bool(layer.get("kept_float")))),
            ]
            for layer in ordered
        ],
        left=3,
    )


def _rank(effect: Any) -> float:
    """The largest first, before it what is not finite, after it what was not measured."""
    return math.inf if not _is_number(effect) else -effect if _finite(effect) else -math.inf


def _histograms(histograms: Sequence[Figures]) -> str:
    if not histograms:
        return ""
    return (
        "<p>How often a value occurs, on a logarithmic scale. Dashed lines: the range that is represented; what lies outside (dark) is "
        f'moved to its ends.</p><div class="grid">{"".join(map(_histogram, histograms))}</div>'
    )


def _histogram(h: Figures) -> str:
    counts, edges = h.get("counts") or [], h.get("edges") or []
    name = f"<code>{_text(h.get('graph', ''))} {_text(h.get('tensor', ''))}</code>"
    if len(edges) != len(counts) + 1 or not all(map(_finite, [*counts, *edges])) or not sum(counts) or edges[0] >= edges[-1]:
        return f"<figure>{_missing()}<figcaption>{name}</figcaption></figure>"
    first, last = edges[0], edges[-1]
    low, high = h.get("range") or (None, None)
    chosen = _finite(low) and _finite(high)

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
    method = f" ({_text(h['method'])})" if h.get("method") else ""
    caption = f"range {_number(low)} to {_number(high)}{method}, at least {_percent(lost)} outside" if chosen else f"range: {NOT_MEASURED}"
    return (
        f'<figure><svg viewBox="-1 -1 {WIDTH + 2} {HEIGHT + 16}">{bars}{lines}<path class="axis" d="M0 {HEIGHT}H{WIDTH}"/>'
        f'<text y="{HEIGHT + 12}">{_number(first)}</text><text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end">{_number(last)}</text></svg>'
        f"<figcaption>{name}<br/>{caption}</figcaption></figure>"
    )


def _speed(speed: Figures) -> str:
    if not speed:
        return ""
    most = max(_largest(speed.values()), 1.0)
    return "<p>How many times as fast as fp32 in onnxruntime, on the machine that wrote this page. Dashed line: as fast.</p>" + _table(
        ["", "times", f"0 to {_number(most, '.3g')}"],
        [[_text(name), _number(value, ".2f"), _svg(_bar(value, most) + _line(f"{100 / most:.2f}%"))] for name, value in speed.items()],
    )


def _cells(figures: Figures, columns: Columns) -> list[str]:
    return [write(figures.get(key)) for key, (_, write) in columns.items()]


def _mcnemar(test: Figures | None) -> str:
    if not test:
        return NOT_MEASURED
    return f"{_number(test.get('only_this'))} : {_number(test.get('only_other'))}, p = {_number(test.get('p'), '.2g')}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """``header`` is text, ``rows`` are HTML, the first ``left`` columns text and the others numbers or plots; nothing without rows."""
    if not rows:
        return ""
    classes = ["left" if i < left else "plot" if cell.startswith("<svg") else "number" for i, cell in enumerate(rows[0])]

    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{name}">{cell}</{tag}>' for name, cell in zip(classes, cells, strict=True)) + "</tr>\n"

    return f"<table><thead>{row('th', map(_text, header))}</thead>\n<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"


def _svg(content: str) -> str:
    return f'<svg class="row">{content}</svg>'


def _bar(value: Any, most: float, y: str = "20%", height: str = "60%", hollow: bool = False) -> str:
    """From 0 to ``value`` on a scale that ends at ``most``; nothing where there is no number above 0."""
    if not _finite(value) or value <= 0:
        return ""
    return f'<rect class="{"hollow" if hollow else "bar"}" y="{y}" width="{100 * value / most:.2f}%" height="{height}"/>'


def _interval(interval: Sequence[Any], widest: float) -> str:
    """On a scale from minus ``widest`` to ``widest``: a line at zero, (value, low, high) as a dot in its interval."""
    middle, low, high = interval

    def x(value: float) -> str:
        return f"{50 + 48 * value / widest:.2f}%"

    ends = f'<line class="interval" x1="{x(low)}" x2="{x(high)}" y1="50%" y2="50%"/>' if _finite(low) and _finite(high) else ""
    return _line("50%") + ends + (f'<circle class="bar" cx="{x(middle)}" cy="50%" r="4"/>' if _finite(middle) else "")


def _line(x: str) -> str:
    return f'<line class="limit" x1="{x}" x2="{x}" y2="100%"/>'


def _largest(values: Iterable[Any]) -> float:
    """The end of a scale: never 0, so that it divides."""
    return float(max((x for x in values if _finite(x) and x > 0), default=1.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _number(value: Any, form: str = "") -> str:
    if not _is_number(value):
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"  # fp16 that overflowed, say: measured, and as bad as can be
    return format(value, form or (",d" if isinstance(value, int) else ".4g"))


def _percent(value: Any) -> str:
    return _number(value, ".2%")


def _points(value: Any) -> str:
    return _number(100 * value, "+.2f") if _is_number(value) else NOT_MEASURED


def _points_interval(value: Any) -> str:
    return f"{_points(value[0])} to {_points(value[1])}" if value else NOT_MEASURED


def _fixed(digits: int) -> Callable[[Any], str]:
    return lambda value: _number(value, f".{digits}f")


def _missing() -> str:
    return f"<p>{NOT_MEASURED}</p>"


def _text(value: Any) -> str:
    """As HTML, in one line: no markup, no control characters and no half of a surrogate pair that a name might smuggle in."""
    return escape("".join(c if c.isprintable() else "?" for c in " ".join(str(value).split())))


AGREEMENT: Columns = {
    "n": ("questions", _number),
    "answered": ("answered", _number),
    "agreement": ("answers agree", _percent),
    "candidate_agreement": ("best candidates agree", _percent),
}
ACCURACY: Columns = {
    "accuracy_fp32": ("reference, fp32", _fixed(4)),
    "accuracy": ("bundle", _fixed(4)),
    "difference": ("difference", _points),
    "difference_ci95": ("95% interval", _points_interval),
}
TENSORS: Columns = {
    "n": ("rows", _number),
    "cosine": ("least cosine", _fixed(5)),
    "cosine_mean": ("mean cosine", _fixed(5)),
    "max_abs": ("largest difference", _number),
    "largest": ("largest value", _number),
}

STYLE = """
@page { margin: 15mm }
body { font: 14px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 64em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.2em; margin-top: 1.8em; border-bottom: 1px solid #999 }
h3 { font-size: 1em }
h1, h2, h3, p { break-after: avoid }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd }
th { vertical-align: bottom }
td.number { white-space: nowrap }
th.left, td.left, th.plot { text-align: left }
.left:first-child { padding-left: 0 }
td.plot { width: 28%; height: 18px; padding: 0 8px }
tr, figure { break-inside: avoid }
code { font: 12px/1.3 ui-monospace, monospace; overflow-wrap: anywhere }
svg { display: block }
svg.row { width: 100%; height: 18px }
svg text { font-size: 11px }
.bar { fill: #2b5f9e }
.hollow { fill: #fff; stroke: #2b5f9e; stroke-width: 1.5 }
.outside { fill: #111 }
.interval { stroke: #2b5f9e; stroke-width: 2 }
.limit { stroke: #111; stroke-dasharray: 4 2; fill: none }
.axis { stroke: #111 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.2em }
figure { margin: 0 }
figcaption { font-size: 12px }
footer { margin-top: 2em; font-size: 12px }
@media print {
body { font-size: 11px; margin: 0; max-width: none; padding: 0 }
code { font-size: 9px }
figcaption { font-size: 10px }
}
"""
