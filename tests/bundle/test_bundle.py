"""Bundles: what is written can be read, and what was changed is named."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.bundle.files import manifest_from_bundle, verify_bundle, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST, SEAL
from pmclip_deploy.bundle.types import Engine, Graph, Head
from pmclip_deploy.errors import BundleError
from tests.command import Result
from tests.tiny.bundle import HEADS, tiny_bundle, tiny_files, tiny_manifest

ENGINE = Engine("image", "image.sm86.engine", "tensorrt_rtx", "1.7.1", ("8.6", "12.0"), "linux-x86_64", "0" * 64, (1, 1, 8), "f" * 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def words_bundle(tmp_path: Path) -> Path:
    """Its head reads words and sees grey features; one of its graphs has an engine."""
    files = {**tiny_files("mevf"), ENGINE.file: b"plan"}
    write_bundle(tmp_path / "words", tiny_manifest("mevf", engines=(ENGINE,), target="rtx"), files)
    return tmp_path / "words"


def edit(bundle: Path, change: Any) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b", tiny_manifest(metrics={"accuracy": 0.5}), tiny_files())
    assert verify_bundle(tmp_path / "b") == written
    assert Manifest.from_json(written.to_json()) == written
    assert sorted(written.files) == ["head.onnx", "image.onnx", "text.onnx", "tokenizer.json"]


@pytest.mark.parametrize("kind", [None, *HEADS])
def test_every_kind_of_bundle_is_read_as_it_was_written(tmp_path: Path, kind: str | None) -> None:
    manifest = tiny_manifest(kind, engines=(ENGINE, replace(ENGINE, graph="text", plugin_sha256=None)))
    manifest = replace(manifest, graphs={**manifest.graphs, "image": Graph("image.onnx", "int8", ("Conv_0", "pool"))})
    files = {**tiny_files(kind), ENGINE.file: b"plan"}
    written = write_bundle(tmp_path / "b", manifest, files)
    assert verify_bundle(tmp_path / "b") == written and replace(written, files={}) == manifest
    assert sorted(written.files) == sorted(files)


def test_a_manifest_from_before_heads_were_named_is_of_a_lite_head(bundle: Path) -> None:
    def older(data: Any) -> None:
        for key in ("head", "engines"):
            del data[key]
        for graph in data["graphs"].values():
            del graph["float_layers"]
        for kind in data["kinds"]:
            del kind["independent"]

    now = manifest_from_bundle(bundle)
    edit(bundle, older)
    assert manifest_from_bundle(bundle) == now and now.head == Head("lite")


def test_details_are_a_lite_heads(tmp_path: Path) -> None:
    manifest = replace(tiny_manifest(), head=Head("lite", details=640))
    assert replace(write_bundle(tmp_path / "b", manifest, tiny_files()), files={}) == manifest
    for wrong in ({"kind": "lite", "grey": {}, "details": -1}, {**tiny_manifest("mevf").to_json()["head"], "details": 640}):
        with pytest.raises(ValueError, match=r"head\.details"):
            Manifest.from_json({**manifest.to_json(), "head": wrong})


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


def test_nothing_may_be_parsed_from_the_first_problem_on(bundle: Path) -> None:
    told, again = list[str](), list[str]()
    manifest = verify_bundle(bundle, verified=lambda name, content: told.append(name))
    assert sorted(told) == sorted(manifest.files)
    changed = told[2]
    (bundle / changed).write_bytes(bytes(manifest.files[changed].bytes))
    with pytest.raises(BundleError, match=f"{changed} has changed"):
        verify_bundle(bundle, manifest, lambda name, content: again.append(name))
    assert again == told[:2]
    (bundle / SEAL).unlink()
    with pytest.raises(BundleError):
        verify_bundle(bundle, manifest, lambda name, content: again.append(name))
    assert again == told[:2]


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
    "schema of two lines": lambda d: d.update(schema="a\nb"),
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
    "temperature of almost zero": lambda d: d["kinds"][0].update(temperature=1e-320),
    "temperature of a million": lambda d: d["kinds"][0].update(temperature=1e6),
    "threshold below 0": lambda d: d["kinds"][0].update(threshold=-1),
    "threshold of 7": lambda d: d["kinds"][0].update(threshold=7),
    "threshold just above 1": lambda d: d["kinds"][0].update(threshold=1.0000001),
    "threshold of the kind below 0": lambda d: d["abstention"].update(kind_threshold=-1),
    "threshold of the kind of 7": lambda d: d["abstention"].update(kind_threshold=7),
    "threshold of radiographs that lets nothing pass": lambda d: d["abstention"].update(radiograph_threshold=1e9),
    "threshold of radiographs that lets all pass": lambda d: d["abstention"].update(radiograph_threshold=-1e9),
    "coverage above 1": lambda d: d["abstention"].update(curve=[[1.5, 0.5]]),
    "std of almost zero": lambda d: d["preprocess"].update(std=[0.5, 1e-320, 0.5]),
    "std that hides the picture": lambda d: d["preprocess"].update(std=[0.5, 1e30, 0.5]),
    "mean far from a picture": lambda d: d["preprocess"].update(mean=[0.5, 1e30, 0.5]),
    "logit scale of zero": lambda d: d.update(logit_scale=0),
    "negative logit scale": lambda d: d.update(logit_scale=-10),
    "logit scale that overflows": lambda d: d.update(logit_scale=1e300),
    "logit bias that is no number": lambda d: d.update(logit_bias="-10"),
    "logit bias that overflows": lambda d: d.update(logit_bias=-1e300),
    "another filter": lambda d: d["preprocess"].update(interpolation="nearest"),
    "infinite threshold": lambda d: d["kinds"][0].update(threshold=float("inf")),
    "huge threshold": lambda d: d["kinds"][0].update(threshold=10**400),
    "kind without answers": lambda d: d["kinds"][0].update(answers=[]),
    "kind is a list": lambda d: d.update(kinds=[[]]),
    "curve of triples": lambda d: d["abstention"].update(curve=[[1, 2, 3]]),
    "words for a lite head": lambda d: d["head"].update(words={"length": 12, "pad_id": 3}),
    "a lite head without the towers": lambda d: d["head"].update(clip=False),
    "a graph for no head": lambda d: d.update(head=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_manifest_is_one_line(bundle: Path, name: str) -> None:
    edit(bundle, CHANGES[name])
    with pytest.raises(BundleError) as caught:
        manifest_from_bundle(bundle)
    assert str(bundle / MANIFEST) in str(caught.value) and "\n" not in str(caught.value) and "export" in str(caught.value)


# What each says of a bundle whose head reads words.
WORDS_CHANGES: dict[str, tuple[Any, str]] = {
    "head without its graph": (lambda d: d["graphs"].pop("head"), "graphs.head is missing, which the head needs"),
    "features without their graph": (lambda d: d["graphs"].pop("features"), "graphs.features is missing, which the head needs"),
    "features that nothing needs": (lambda d: d["head"].update(grey={}), "graphs.features is there, and no head that needs it"),
    "labels without their graph": (lambda d: d.update(labels=["a", "b"]), "graphs.labels is missing, which the labels need"),
    "a graph of no labels": (lambda d: d["graphs"].update(labels=d["graphs"]["head"]), "graphs.labels is there, and no labels"),
    "labels unlisted": (
        lambda d: d.update(labels=["a", "b"], graphs={**d["graphs"], "labels": d["graphs"]["head"]}),
        '"files" does not list labels.npy',
    ),
    "labels are numbers": (lambda d: d.update(labels=[1]), "labels[0] is not a text"),
    "unknown graph": (lambda d: d["graphs"].update(tail=d["graphs"]["head"]), "graphs.tail is unknown"),
    "words.json unlisted": (lambda d: d["files"].pop("words.json"), '"files" does not list words.json'),
    "engine unlisted": (lambda d: d["files"].pop(ENGINE.file), f'"files" does not list {ENGINE.file}'),
    "head is a list": (lambda d: d.update(head=[]), "head is not an object"),
    "unknown head": (lambda d: d["head"].update(kind="san"), "head.kind is 'san', not one of lite, mevf, qcr"),
    "lite that reads words": (lambda d: d["head"].update(kind="lite"), "a lite head sees what the towers give alone"),
    "no words": (lambda d: d["head"].update(words=None), "head.words is missing"),
    "words are a number": (lambda d: d["head"].update(words=12), "head.words is not an object"),
    "no length": (lambda d: d["head"]["words"].pop("length"), "head.words.length is missing"),
    "length 0": (lambda d: d["head"]["words"].update(length=0), "head.words.length is 0"),
    "negative pad": (lambda d: d["head"]["words"].update(pad_id=-1), "head.words.pad_id is -1"),
    "no grey": (lambda d: d["head"].pop("grey"), "head.grey is missing"),
    "grey is a list": (lambda d: d["head"].update(grey=["maml"]), "head.grey is not an object"),
    "huge grey": (lambda d: d["head"]["grey"].update(maml=10**6), "head.grey.maml is 1000000"),
    "clip is a number": (lambda d: d["head"].update(clip=1), "head.clip is not true or false"),
    "float layers are a number": (lambda d: d["graphs"]["head"].update(float_layers=3), "float_layers is not a list"),
    "independent is a number": (lambda d: d["kinds"][0].update(independent=1), "independent is not true or false"),
    "engines are an object": (lambda d: d.update(engines={}), "engines is not a list"),
    "engine is a string": (lambda d: d.update(engines=["x.engine"]), "engines[0] is not an object"),
    "engine of no graph": (lambda d: d["engines"][0].update(graph="tail"), "engines[0].graph is 'tail', not one of image"),
    "engine outside": (lambda d: d["engines"][0].update(file="../x"), "is no file name inside the bundle"),
    "engine of another runtime": (lambda d: d["engines"][0].update(backend="openvino"), "not one of tensorrt_rtx, tensorrt"),
    "engine without a version": (lambda d: d["engines"][0].pop("version"), "engines[0].version is missing"),
    "engine for nothing": (lambda d: d["engines"][0].update(compute_capabilities=[]), "compute_capabilities is not a list of"),
    "capability is a name": (lambda d: d["engines"][0].update(compute_capabilities=["sm86"]), "compute_capabilities is not a list of"),
    "capability is a number": (lambda d: d["engines"][0].update(compute_capabilities=[8.6]), "compute_capabilities is not a text"),
    "engine of no model": (lambda d: d["engines"][0].update(onnx_sha256="abc"), "engines[0].onnx_sha256 is no sha256"),
    "plugin without a hash": (lambda d: d["engines"][0].update(plugin_sha256="yes"), "engines[0].plugin_sha256 is no sha256"),
    "profile of two": (lambda d: d["engines"][0].update(profile=[1, 8]), "engines[0].profile is not [least, usual, largest]"),
    "profile downwards": (lambda d: d["engines"][0].update(profile=[1, 8, 4]), "engines[0].profile is not [least, usual, largest]"),
    "profile from 0": (lambda d: d["engines"][0].update(profile=[0, 1, 4]), "engines[0].profile is 0"),
}


@pytest.mark.parametrize("name", WORDS_CHANGES)
def test_a_bad_manifest_says_what_is_wrong(words_bundle: Path, name: str) -> None:
    manifest_from_bundle(words_bundle)
    change, said = WORDS_CHANGES[name]
    edit(words_bundle, change)
    with pytest.raises(BundleError) as caught:
        manifest_from_bundle(words_bundle)
    assert said in str(caught.value) and str(words_bundle / MANIFEST) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bundle_that_would_not_read_back_is_not_written(tmp_path: Path) -> None:
    files = tiny_files("mevf")
    for name in ("words.json", "features.onnx"):
        with pytest.raises(BundleError, match=f"does not list {name}"):
            write_bundle(tmp_path / "b", tiny_manifest("mevf"), {k: v for k, v in files.items() if k != name})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["words.json", "features.onnx", ENGINE.file])
def test_the_other_files_are_verified_too(words_bundle: Path, name: str) -> None:
    verify_bundle(words_bundle)
    (words_bundle / name).write_bytes((words_bundle / name).read_bytes()[::-1])
    with pytest.raises(BundleError, match=f"{name} has changed"):
        verify_bundle(words_bundle)
    (words_bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        verify_bundle(words_bundle)


def test_show(words_bundle: Path, tmp_path: Path, command: Callable[..., Result]) -> None:
    def shown(path: Path) -> str:
        code, out, err = command("bundle", "show", path)
        assert (code, err) == (0, "")
        return out

    edit(words_bundle, lambda d: d["graphs"]["image"].update(precision="int8", float_layers=["a", "b"]))
    text = shown(words_bundle)
    for line in (
        "head:     mevf, sees the image's embedding, autoencoder 16 x 16, maml 12 x 12, reads 4 words",
        "answers:  5, in 1 kind of question",
        "abstains: if the kind of question is less likely than 0.00, if no word is known, if the best answer is less likely than 0.60",
        "graph:    image, int8, image.onnx, layers in float: 2",
        "graph:    text, fp32, text.onnx",
        "graph:    features, fp32, features.onnx",
        "engine:   image, tensorrt_rtx 1.7.1, compute capability 8.6, 12.0, linux-x86_64, batch 1 to 8, image.sm86.engine",
    ):
        assert line + "\n" in text
    towers = shown(tiny_bundle(tmp_path / "towers", None))
    assert "head:     none; the bundle embeds images and texts, and answers no question\n" in towers
    assert "answers:" not in towers and "abstains:" not in towers and "engine:" not in towers
    blind = shown(tiny_bundle(tmp_path / "blind", "blind"))
    assert "head:     mevf, sees nothing of the image, reads 4 words\n" in blind
    lite = shown(tiny_bundle(tmp_path / "lite"))
    assert "head:     lite, sees the image's embedding, reads the text's embedding\n" in lite
    assert "abstains: if the kind of question is less likely than 0.50, if the logit of a radiology image is below 0.00, " in lite
    assert ", if the best answer is less likely than 0.00 to 0.60 (depends on the kind of question)\n" in lite


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"schema": NaN}'])
def test_a_manifest_that_is_no_json_object(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="not a usable manifest"):
        manifest_from_bundle(bundle)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"0.5"', "null", "[0.5]"])
@pytest.mark.parametrize("key", ["temperature", "threshold", "kind_threshold", "radiograph_threshold", "logit_scale"])
def test_what_is_no_number_is_refused(bundle: Path, key: str, value: str) -> None:
    content, found = re.subn(rf'"{key}": [-\d.e]+', f'"{key}": {value}', (bundle / MANIFEST).read_text())
    assert found
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="not a usable manifest"):
        manifest_from_bundle(bundle)


@pytest.mark.parametrize("key", ["name", "threshold", "image.onnx", "sha256", "kinds", "temperature"])
def test_a_key_that_is_there_twice_is_refused(bundle: Path, key: str) -> None:
    """At any depth, also with one value twice."""
    content = (bundle / MANIFEST).read_text()
    place = content.index(f'"{key}":')
    end = json.JSONDecoder().raw_decode(content, content.index(":", place) + 2)[1]
    (bundle / MANIFEST).write_text(f"{content[:end]}, {content[place:]}")
    with pytest.raises(BundleError, match=rf"the key '{re.escape(key)}' is there twice"):
        manifest_from_bundle(bundle)


def test_a_key_that_is_there_twice_is_found_in_one_pass() -> None:
    """Names are compared a few times each, not each with all: 16 MB of keys would take an hour."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    pairs = [(Name(f"key {i}"), i) for i in range(2000)]
    with pytest.raises(ValueError, match="'key 1999' is there twice"):
        no_twin([*pairs, (Name("key 1999"), 0)])
    assert compared < 10 * len(pairs)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        manifest_from_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no bundle"):
        manifest_from_bundle(tmp_path)
