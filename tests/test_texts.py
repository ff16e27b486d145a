"""Every text file that a user gives is read the same way: with a byte order mark, the line ends of any system, and no other encoding."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmclip_deploy.cli.classify import labels_from_file
from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation.rows import rows_from_jsonl
from pmclip_deploy.texts import lines_of_file, text_of_file

ROWS = [json.dumps({"image": f"{i}.png", "question": "is it\u2028so?", "answer": "yes"}, ensure_ascii=False) for i in range(3)]


def of_datasets(path: Path) -> Any:
    pytest.importorskip("torch", reason="training needs the extra `train`")
    from pmclip_deploy.train.datasets.schema import rows_from_jsonl

    return rows_from_jsonl(path, ("image", "question"))


def of_maml(path: Path) -> Any:
    pytest.importorskip("torch", reason="training needs the extra `train`")
    from pmclip_deploy.train.maml import paths_by_label

    return paths_by_label(path)


def of_table(path: Path) -> Any:
    from pmclip_deploy.train.finding_data import _from_table

    return _from_table(path)


def of_glove(path: Path) -> Any:
    pytest.importorskip("torch", reason="training needs the extra `train`")
    from pmclip_deploy.train.heads.words import Dictionary, vectors_from_glove

    return vectors_from_glove(path, Dictionary(("heart", "lung"))).tolist()


READERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "evaluate": (rows_from_jsonl, ROWS),
    "labels": (labels_from_file, ["chest x-ray", "ct", "straße"]),
    "datasets": (of_datasets, ROWS),
    "maml": (of_maml, ['{"image": "a.png", "label": "x"}', '{"image": "b.png", "label": "y\u2028"}']),
    "table": (of_table, ["path,label,group", 'a.png,yes,"1, 2"', "b.png,no,"]),
    "semicolons": (of_table, ["path;label", "a,b.png;yes", "b.png;no"]),
    "tabs": (of_table, ["path\tlabel", "a,b.png\tyes", "b.png\tno"]),
    "glove": (of_glove, ["heart 0.1 0.2", "lung 0.3 0.4"]),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> tuple[Callable[[Path], Any], str]:
    read, lines = READERS[request.param]
    return read, "\n".join(lines) + "\n"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_mark_and_line_ends(reader: tuple[Callable[[Path], Any], str], mark: str, end: str, tmp_path: Path) -> None:
    read, text = reader
    (tmp_path / "plain").write_bytes(text.encode())
    (tmp_path / "other").write_bytes((mark + text.replace("\n", end)).encode())
    assert read(tmp_path / "other") == read(tmp_path / "plain")


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(reader: tuple[Callable[[Path], Any], str], code: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(reader[1].encode(code))
    with pytest.raises(InputError, match=rf"x: is {code[:6].upper()}; save the file as UTF-8"):
        reader[0](tmp_path / "x")


def test_what_is_packed_or_in_windows_1252_is_said(reader: tuple[Callable[[Path], Any], str], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(gzip.compress(reader[1].encode()))
    with pytest.raises(InputError, match="x: is compressed with gzip; unpack it first"):
        reader[0](tmp_path / "x")
    (tmp_path / "y").write_bytes(reader[1].encode() + b"\n\nna\xefve\n")
    with pytest.raises(InputError, match=rf"y: line {reader[1].count(chr(10)) + 3}: not UTF-8; save the file as UTF-8"):
        reader[0](tmp_path / "y")


def test_two_files_put_together_have_a_mark_in_the_middle(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).write_text(ROWS[0] + "\r\n", encoding="utf-8-sig", newline="")
    (tmp_path / "both").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert [row.image for row in rows_from_jsonl(tmp_path / "both")] == ["0.png"] * 2


def test_lines_have_the_numbers_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf\r\n a \r\n\r\n \t\nb\x0b\xc2\x85c\rd")
    assert list(lines_of_file(tmp_path / "x", "")) == [(2, " a "), (5, "b\x0b\x85c"), (6, "d")]
    assert text_of_file(tmp_path / "x", "") == "\r\n a \r\n\r\n \t\nb\x0b\x85c\rd"
    (tmp_path / "empty").touch()
    assert list(lines_of_file(tmp_path / "empty", "")) == [] and text_of_file(tmp_path / "empty", "") == ""


def test_a_file_that_is_not_there_has_its_hint(reader: tuple[Callable[[Path], Any], str], tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        if path.is_file() or (path.is_dir() and reader[0] is of_maml):  # which takes a folder too
            continue
        with pytest.raises(InputError, match=r"cannot be read \(.*\); "):
            reader[0](path)
