"""Bundles: what is written can be read, and what was changed is named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_bundle, tiny_files, tiny_manifest

from pmclip_deploy.bundle import MANIFEST, SEAL, Manifest, manifest_from_bundle, verify_bundle, write_bundle
from pmclip_deploy.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def edit(bundle: Path, change: Any) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b", tiny_manifest(metrics={"accuracy": 0.5}), tiny_files())
    assert verify_bundle(tmp_path / "b") == written
    assert Manifest.from_json(written.to_json()) == written
    assert sorted(written.files) == ["head.onnx", "image.onnx", "text.onnx", "tokenizer.json"]


def test_a_source_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(tiny_files()["image.onnx"])
    write_bundle(tmp_path / "b", tiny_manifest(), {**tiny_files(), "image.onnx": tmp_path / "weights"})
    verify_bundle(tmp_path / "b")


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_beside(tmp_path: Path) -> None:
    first = (tiny_bundle(tmp_path / "b") / MANIFEST).read_bytes()
    (tmp_path / "b" / "stray").touch()
    assert (tiny_bundle(tmp_path / "b") / MANIFEST).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    verify_bundle(tmp_path / "b")


def test_a_failed_write_keeps_the_old_bundle(bundle: Path) -> None:
    for files in ({**tiny_files(), "../evil": b""}, {"image.onnx": b""}, {**tiny_files(), "x": bundle / "nowhere"}):
        with pytest.raises(BundleError):
            write_bundle(bundle, tiny_manifest(), files)
        verify_bundle(bundle)
        assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not overwritten"):
        tiny_bundle(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "head.onnx", "tokenizer.json"])
def test_a_changed_byte_is_named(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} has changed"):
        verify_bundle(bundle)


def test_a_changed_threshold_answer_or_seal_is_refused(bundle: Path) -> None:
    verify_bundle(bundle)
    good = (bundle / MANIFEST).read_bytes()
    for changed in (good.replace(b"0.6", b"0.1"), good.replace(b'"yes"', b'"no "'), good + b" "):
        (bundle / MANIFEST).write_bytes(changed)
        with pytest.raises(BundleError, match=r"manifest\.json has changed"):
            verify_bundle(bundle)
    (bundle / MANIFEST).write_bytes(good)
    (bundle / SEAL).write_bytes((bundle / SEAL).read_bytes() + b"\n")
    with pytest.raises(BundleError, match=SEAL):
        verify_bundle(bundle)
    (bundle / SEAL).unlink()
    with pytest.raises(BundleError, match=f"{SEAL} is missing"):
        verify_bundle(bundle)


def test_missing_extra_and_truncated_files_are_named_in_one_line(bundle: Path) -> None:
    (bundle / "text.onnx").unlink()
    (bundle / "extra.bin").touch()
    (bundle / "head.onnx").write_bytes(b"")
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    message = str(caught.value)
    assert "text.onnx is missing" in message and "'extra.bin' does not belong" in message and "head.onnx has changed" in message
    assert "\n" not in message


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and /dev")
def test_links_count_by_their_content(bundle: Path) -> None:
    (bundle / "text.onnx").rename(bundle.parent / "blob")
    (bundle / "text.onnx").symlink_to(bundle.parent / "blob")
    verify_bundle(bundle)
    (bundle / "text.onnx").unlink()
    (bundle / "text.onnx").symlink_to("/dev/zero")  # endless
    with pytest.raises(BundleError, match=r"text\.onnx is missing"):
        verify_bundle(bundle)


CHANGES: dict[str, Any] = {
    "schema": lambda d: d.update(schema="pmclip-deploy/bundle/2"),
    "no schema": lambda d: d.pop("schema"),
    "no name": lambda d: d.pop("name"),
    "number for a name": lambda d: d.update(name=3),
    "true for a number": lambda d: d.update(embed_dim=True),
    "huge size": lambda d: d["preprocess"].update(size=10**9),
    "unknown resize": lambda d: d["preprocess"].update(resize="stretch"),
    "two means": lambda d: d["preprocess"].update(mean=[0.5, 0.5]),
    "zero std": lambda d: d["preprocess"].update(std=[0.5, 0, 0.5]),
    "no head": lambda d: d["graphs"].pop("head"),
    "graph is a string": lambda d: d["graphs"].update(head="head.onnx"),
    "graph outside": lambda d: d["graphs"]["image"].update(file="../image.onnx"),
    "graph absolute": lambda d: d["graphs"]["image"].update(file="/etc/passwd"),
    "graph in a folder": lambda d: d["graphs"]["image"].update(file="a\\b"),
    "graph unlisted": lambda d: d["graphs"]["image"].update(file="other.onnx"),
    "file outside": lambda d: d["files"].update({"../../x": {"sha256": "0" * 64, "bytes": 1}}),
    "file lists the manifest": lambda d: d["files"].update({MANIFEST: {"sha256": "0" * 64, "bytes": 1}}),
    "short sha": lambda d: d["files"]["text.onnx"].update(sha256="abc"),
    "negative bytes": lambda d: d["files"]["text.onnx"].update(bytes=-1),
    "no files": lambda d: d.pop("files"),
    "no answers": lambda d: d.update(answers=[], kinds=[]),
    "answer out of range": lambda d: d["kinds"][0].update(answers=[99]),
    "negative answer": lambda d: d["kinds"][0].update(answers=[-1]),
    "majority out of range": lambda d: d["kinds"][0].update(majority=99),
    "zero temperature": lambda d: d["kinds"][0].update(temperature=0),
    "infinite threshold": lambda d: d["kinds"][0].update(threshold=float("inf")),
    "huge threshold": lambda d: d["kinds"][0].update(threshold=10**400),
    "kind without answers": lambda d: d["kinds"][0].update(answers=[]),
    "kind is a list": lambda d: d.update(kinds=[[]]),
    "curve of triples": lambda d: d["abstention"].update(curve=[[1, 2, 3]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_manifest_is_one_line(bundle: Path, name: str) -> None:
    edit(bundle, CHANGES[name])
    with pytest.raises(BundleError) as caught:
        manifest_from_bundle(bundle)
    assert str(bundle / MANIFEST) in str(caught.value) and "\n" not in str(caught.value) and "export" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"schema": NaN}'])
def test_a_manifest_that_is_no_json_object(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="not a usable manifest"):
        manifest_from_bundle(bundle)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        manifest_from_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no bundle"):
        manifest_from_bundle(tmp_path)
