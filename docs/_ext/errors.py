"""The table of errors and exit codes, made from the classes: replaces ``% errors`` in a page."""

from collections.abc import Iterator

from sphinx.application import Sphinx

from pmclip_deploy import errors

MARK = "% errors"


def page() -> str:
    rows = (
        f"| `{kind.__name__}` | {_base(kind)} | `{kind.code}` | {kind.exit_code} | {_meaning(kind)} |" for kind in _tree(errors.PmclipError)
    )
    return "\n".join(["| Error | Is also a | Code | Exit code | Raised when |", "|---|---|---|---|---|", *rows])


def _tree(kind: type[errors.PmclipError]) -> Iterator[type[errors.PmclipError]]:
    yield kind
    for one in kind.__subclasses__():
        if one.__module__ == errors.__name__:
            yield from _tree(one)


def _base(kind: type[errors.PmclipError]) -> str:
    return f"`{kind.__base__.__name__}`" if kind.__base__ is not None else ""


def _meaning(kind: type[errors.PmclipError]) -> str:
    """The first sentence of the docstring; the class's own, since exceptions inherit ``Exception``'s."""
    return (kind.__dict__.get("__doc__") or "").split("\n\n")[0].replace("\n", " ").strip()


def _replace(app: Sphinx, name: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, page())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
