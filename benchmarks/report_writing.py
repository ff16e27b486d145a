"""A document of headings, tables and code, as Markdown and as one page of HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pmclip_deploy.export import page
from pmclip_deploy.export.page import NOT_MEASURED, bar, finite, line, one_line


@dataclass(frozen=True)
class Plot:
    """A bar from 0 with its quartiles and lines to compare it with; in HTML alone."""

    value: Any
    most: float
    low: Any = None
    high: Any = None
    lines: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of text; a Plot stands in HTML alone."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Plot]]
    left: int = 1  # so many columns are text


@dataclass(frozen=True)
class Heading:
    """Below that of a section."""

    text: str


@dataclass(frozen=True)
class Code:
    text: str


Block = str | Table | Heading | Code  # a str is a paragraph, without any markup
Document = Mapping[str, Sequence[Block]]

LEAD = (
    "Made from rows of results by python -m pmclip_deploy.benchmarks.report; nothing here is typed by hand. Ratios are of one run, in "
    "which systems took turns on the same weights, inputs and threads after their outputs were compared. Absolute times belong to their "
    "machine alone. Quartiles are the 25th and the 75th percentile. In comparisons ViT-B/32 and RN50 have random weights in the "
    "published layout; the ViT-B/32 that answers is the trained one of docs/howto/make-a-trained-vit.md."
)


def html(of: Document) -> str:
    """The document as one page that fetches nothing."""
    return page.page("Benchmarks", f"<p>{page.text(LEAD)}</p>", {name: "".join(map(_html, blocks)) for name, blocks in of.items()})


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{page.text(block)}</p>\n"
    if isinstance(block, Heading):
        return f"<h3>{page.text(block.text)}</h3>\n"
    if isinstance(block, Code):
        return f"<p><code>{page.text(block.text)}</code></p>\n"
    if not block.rows:
        return page.missing()
    return page.table(block.header, [[_cell(cell) for cell in row] for row in block.rows], block.left) + "\n"


def _cell(cell: str | Plot) -> str:
    if isinstance(cell, str):
        return page.text(cell)
    low, high = (f"{100 * min(max(x, 0), cell.most) / cell.most:.2f}%" if finite(x) else None for x in (cell.low, cell.high))
    ends = f'<line class="spread" x1="{low}" x2="{high}" y1="50%" y2="50%"/>' if low and high else ""
    return page.svg(bar(cell.value, cell.most) + ends + "".join(line(f"{100 * x / cell.most:.2f}%") for x in cell.lines))


def markdown(of: Document) -> str:
    sections = [f"## {_plain(name)}\n\n" + "\n\n".join(map(_markdown, blocks or [NOT_MEASURED])) for name, blocks in of.items()]
    return "\n\n".join(["# Benchmarks", _plain(LEAD), *sections]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Heading):
        return f"### {_plain(block.text)}"
    if isinstance(block, Code):
        return f"    {one_line(block.text)}"
    if not block.rows:
        return NOT_MEASURED
    shown = [i for i, cell in enumerate(block.rows[0]) if isinstance(cell, str)]
    rules = ["---" if i < block.left else "---:" for i in shown]
    rows = [[_plain(row[i]) for i in shown] for row in (block.header, *block.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rules, *rows[1:]))


MARKUP = re.compile(r"[\\`*\[\]|~$#@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")


def _plain(value: object) -> str:
    """Text that Markdown leaves as it is: no markup, no HTML and no link."""
    return escape(MARKUP.sub(lambda found: "\\" + found.group(), one_line(value)), quote=False)
