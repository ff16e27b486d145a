"""The table of errors and exit codes, made from the classes."""

from collections.abc import Iterator

from pmclip_deploy import errors


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
