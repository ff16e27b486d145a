"""The documentation names what is there, and its reference lists everything. `make docs` builds it, with warnings as errors."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from pmclip_deploy import answer, errors
from pmclip_deploy.cli.app import COMMANDS, app_of
from tests.sources import FOLDERS, ROOT, modules

DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")])


def test_every_page_that_code_names_is_there() -> None:
    files = modules(*FOLDERS, "tests", "docs")
    named = {(hit, path.name) for path in files for hit in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8"))}
    assert named and not [(hit, where) for hit, where in named if not (ROOT / hit).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_json_reference_names_every_schema_and_field() -> None:
    page = (DOCS / "reference" / "json.md").read_text("utf-8")
    schemas = {hit for path in modules() for hit in re.findall(r'"(pmclip-deploy/[\w-]+/\d+)"', path.read_text("utf-8"))}
    internal = {"pmclip-deploy/guard/1", "pmclip-deploy/index-journal/1", "pmclip-deploy/index-journal/2"}  # read by the same command alone
    assert schemas - internal == {hit for hit in re.findall(r"`(pmclip-deploy/[\w-]+/\d+)`", page)}
    documents = (answer.Answer, answer.ImageInfo, answer.ModelInfo, answer.Worth, answer.Classification, answer.Label, answer.Match)
    fields = {field.name for document in documents for field in dataclasses.fields(document)}
    assert not [field for field in fields if f"`{field}`" not in page]


def test_every_error_has_a_docstring_and_an_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PmclipError)]
    assert len(kinds) > 6 and all(vars(kind).get("__doc__") and kind.exit_code for kind in kinds)


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://a.example/x.js">',
        "<link rel='stylesheet' href=//a.example/x.css>",
        "@font-face { src: url(https://a.example/x.woff2) }",
        '@import "https://a.example/x.css"',
        '<img alt="" src="http://a.example/x.png">',
        "fetch('https://a.example/')",
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_found(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    monkeypatch.delitem(sys.modules, "checks", raising=False)
    from checks import fetched  # type: ignore[import-not-found]

    (tmp_path / "ours.html").write_text('<a href="https://a.example/">a link</a><script src="_static/x.js"></script><link href="x.css">')
    assert fetched(tmp_path) == []
    for suffix in ("html", "css", "js"):
        (tmp_path / f"theirs.{suffix}").write_text(page)
    assert len(fetched(tmp_path)) == 3


def commands_of(page: Path) -> list[list[str]]:
    """The lines of a page that call pmclip-deploy, in words, without comments."""
    blocks = re.findall(r"```(?:bash|console)?\n(.*?)```", page.read_text("utf-8"), re.S)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    called = (re.match(r"(?:\$ |\S*/bin/|[A-Z_]+=\S+ |torchrun .*)?pmclip-deploy (.*)", line) for line in lines)
    return [call[1].split() for call in called if call]


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_commands_in_pages_exist_with_their_options(page: Path) -> None:
    program: Any = typer.main.get_command(app_of(COMMANDS))
    for words in commands_of(page):
        two = " ".join(words[:2])  # `export triton` stands beside `export`, which takes an argument
        command, rest = program, [two, *words[2:]] if two in COMMANDS else words
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        assert not hasattr(command, "commands"), f"{page.name}: {words} is no command"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
        used = {word.strip("[]").partition("=")[0] for word in rest if re.match(r"\[?--\w", word)}
        assert used <= known, f"{page.name}: {' '.join(words)}: {used - known}"


RIDDLES = r"\b[Aa]s for infer\b| of ours\b|\bis told\b|takes nothing apart|, else |\bNo GPU was at hand\b|\bgoes on where\b"


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_pages_keep_to_plain_words(page: Path) -> None:
    if page.name != "english.md":  # it shows them
        assert not re.findall(RIDDLES, page.read_text("utf-8"))


def test_help_keeps_to_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    monkeypatch.delitem(sys.modules, "commands", raising=False)
    from commands import page  # type: ignore[import-not-found]

    reference = page()
    assert not re.findall(RIDDLES, reference)
    rows = re.findall(r"^\| `([^`]*)` \| (.*) \|$", reference, re.M)
    assert len(rows) > 150 and not [row for row in rows if not re.match(r"[^\\].*[.\]>]$", row[1])], "an option without a sentence of help"
