"""What pages take from the code: replaces each line ``% NAME``, a comment in Markdown. An unknown name fails the build."""

import re

import commands
import errors
import surface
from sphinx.application import Sphinx

from pmclip_deploy.sessions import devices_table

MARKS = {"commands": commands.page, "devices": devices_table, "errors": errors.page, "surface": surface.page}


def _replace(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = re.sub(r"^% (\w+)$", lambda mark: MARKS[mark[1]](), source[0], flags=re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
