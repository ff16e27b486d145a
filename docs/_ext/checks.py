"""Fails the build where a page would fetch a font, a script, a style or a picture from another host."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

HOST = r"""(?:https?:)?//[\w.-]+"""
FETCHED = re.compile(
    rf"""<(?:script|img|iframe|source)\b[^>]*\bsrc\s*=\s*["']?{HOST}"""
    rf"""|<link\b(?![^>]*\brel\s*=\s*["']?canonical)[^>]*\bhref\s*=\s*["']?{HOST}"""
    rf"""|url\(\s*["']?{HOST}|@import\s+["']{HOST}"""
    rf"""|\b(?:fetch|import|importScripts|require)\(\s*["'`]{HOST}|\.src\s*=\s*["'`]{HOST}""",
    re.I,
)


def fetched(folder: Path) -> list[str]:
    """What pages, styles and scripts below a folder fetch from elsewhere, as ``file: text``."""
    files = (path for suffix in ("html", "css", "js") for path in sorted(folder.rglob(f"*.{suffix}")))
    return [f"{path.relative_to(folder)}: {hit}" for path in files for hit in FETCHED.findall(path.read_text(encoding="utf-8"))]


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html" and (hits := fetched(Path(app.outdir))):
        raise ExtensionError("the pages fetch from elsewhere: " + "; ".join(hits))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
