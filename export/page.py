"""A page of HTML that needs nothing but itself: tables, bars in their rows, and text that can hold no markup."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from numbers import Real
from typing import Any, TypeGuard

from pmclip_deploy.console import decimal

NOT_MEASURED = "not measured"


def page(title: str, lead: str, sections: dict[str, str]) -> str:
    """To be stored as UTF-8. ``title`` is text, the rest is HTML; an empty section reads "not measured"."""
    body = "".join(f"<section><h2>{text(name)}</h2>{content or missing()}</section>\n" for name, content in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{text(title)}</title>\n'
        # Nothing is fetched and no script runs, whatever a name in here might hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
        f'<meta name="viewport" content="width=device-width"/>\n<style>{STYLE}</style></head><body>\n'
        f"<h1>{text(title)}</h1>{lead}\n{body}<footer>Research use only; not a medical device.</footer></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """``header`` is text, ``rows`` are HTML, the first ``left`` columns text and the others numbers or plots; nothing without rows."""
    if not rows:
        return ""
    classes = ["left" if i < left else "plot" if cell.startswith("<svg") else "number" for i, cell in enumerate(rows[0])]

    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{name}">{cell}</{tag}>' for name, cell in zip(classes, cells, strict=True)) + "</tr>\n"

    return f"<table><thead>{row('th', map(text, header))}</thead>\n<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"


def svg(content: str) -> str:
    return f'<svg class="row">{content}</svg>'


def bar(value: Any, most: float, y: str = "20%", height: str = "60%", hollow: bool = False) -> str:
    """From 0 to ``value`` on a scale that ends at ``most``; nothing where there is no number above 0."""
    if not finite(value) or value <= 0:
        return ""
    return f'<rect class="{"hollow" if hollow else "bar"}" y="{y}" width="{100 * value / most:.2f}%" height="{height}"/>'


def line(x: str) -> str:
    return f'<line class="limit" x1="{x}" x2="{x}" y2="100%"/>'


def largest(values: Iterable[Any]) -> float:
    """The end of a scale: never 0, so that it divides."""
    return float(max((x for x in values if finite(x) and x > 0), default=1.0))


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def finite(value: Any) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)


def number(value: Any, form: str = "") -> str:
    if not is_number(value):
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"  # fp16 that overflowed, say: measured, and as bad as can be
    return format(value, form or ",d") if isinstance(value, int) else decimal(value, form or ".4g")


def percent(value: Any) -> str:
    return number(value, ".2%")


def missing() -> str:
    return f"<p>{NOT_MEASURED}</p>"


def text(value: Any) -> str:
    """As HTML, in one line: no markup that a name might smuggle in."""
    return escape(one_line(value))


def one_line(value: Any) -> str:
    """Without control characters, and without half of a surrogate pair."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))


STYLE = """
@page { margin: 15mm }
body { font: 14px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 64em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.2em; margin-top: 1.8em; border-bottom: 1px solid #999 }
h3 { font-size: 1em }
h1, h2, h3, p { break-after: avoid }
table { border-collapse: collapse; width: 100%; margin-bottom: 1em; font-variant-numeric: tabular-nums }
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
.spread { stroke: #111; stroke-width: 2 }
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
