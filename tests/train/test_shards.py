"""WebDataset shards: what is read, what is left out by name, and tar files that are damaged, cut short or hostile."""

import gzip
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets import pairs_from_folder, shards
from pmclip_deploy.train.datasets.pictures import Member, picture_of
from pmclip_deploy.train.report import report_from_folder
from tests.tiny.tars import header, tar


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(content, "png")
    return content.getvalue()


PNG, CT = ("bad.png", png(0)), ("bad.txt", b"A CT.")
LONG = b"x" * ((1 << 20) + 1)


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [entry for i in range(start, start + count) for entry in ((f"{i:06}.png", png(i)), (f"{i:06}.txt", f"Picture {i}.".encode()))]


def read(*paths: Path) -> tuple[list[str], dict[str, int]]:
    skipped = Counter[str]()
    return [p.caption for p in shards.pairs_from_shards(list(paths), skipped)], dict(+skipped)


def test_pictures_and_captions_come_in_the_shards_order(tmp_path: Path) -> None:
    about = json.dumps({"caption": " From \n JSON. ", "url": None, "width": 8}).encode()
    first = [("b.png", png(1)), ("b.txt", "\ufeffA  CT – axial.\n".encode()), ("deep/a.PNG", png(2)), ("deep/a.json", about)]
    tar(tmp_path / "000000.tar", *first, ("b.json", b'{"caption": "not this"}'))
    other = [("c.json", b'{"sha": "no caption"}'), ("c.txt", b"Of text."), ("c.seg.png", png(3)), ("c.cls", b"1"), ("c.png", png(4))]
    tar(tmp_path / "000001.tar", *other, ("._c.png", b"macOS"), ("deep", b"", {"type": tarfile.DIRTYPE}))
    skipped = Counter[str]()
    pairs = pairs_from_folder(tmp_path, "train", skipped=skipped)
    assert [(p.image.name, p.caption) for p in pairs] == [("b.png", "A CT – axial."), ("a.PNG", "From JSON."), ("c.png", "Of text.")]
    assert [int(picture_of(p.image).pixels[0, 0]) for p in pairs] == [1, 2, 4] and not +skipped


def test_names_tell_the_split(tmp_path: Path) -> None:
    names = {"train": ["cc3m-000.tar", "train-000.tar", "train-001.tar"], "val": ["valid-000.tar"], "test": ["test/000.tar"]}
    for name in ("._train-002.tar", "notes.txt", *names["train"], *names["val"], *names["test"]):
        tar(tmp_path / name)
    (tmp_path / "train-003.tar").mkdir()
    found = shards.shards_by_split(tmp_path)
    assert {split: [path.relative_to(tmp_path).as_posix() for path in paths] for split, paths in found.items()} == names


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([PNG], "no caption in its txt or json"),
        ([CT], "no picture (jpg, jpeg, png)"),
        ([CT, ("bad.webp", png(0))], "no picture (jpg, jpeg, png)"),
        ([PNG, ("bad.txt", b" \n")], "no caption in its txt or json"),
        ([PNG, ("bad.txt", b"CT \xff")], "a caption that is not UTF-8"),
        ([PNG, ("bad.json", b'{"text": "A CT."}')], "no caption in its txt or json"),
        ([PNG, ("bad.json", b"[" * 100_000)], "no caption in its txt or json"),
        ([PNG, ("bad.json", b'{"caption": "half \\ud800"}')], "no caption in its txt or json"),
        ([PNG, ("bad.txt", LONG)], "a file of more than 1 MiB"),
        ([CT, ("bad.png", LONG)], "a file of more than 1 MiB"),
        ([PNG, CT, PNG], "two files of picture with one key"),
        ([PNG, CT, ("bad.jpg", png(1))], "two files of picture with one key"),
        ([PNG, CT, ("bad.txt", b"An MR.")], "two files of txt with one key"),
        ([CT, ("bad.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"})], "a link, device or sparse file"),
        ([CT, ("bad.png", b"", {"type": tarfile.LNKTYPE, "linkname": "000001.png"})], "a link, device or sparse file"),
        ([CT, ("bad.png", b"", {"type": tarfile.FIFOTYPE})], "a link, device or sparse file"),
    ],
)
def test_a_broken_sample_is_left_out_by_name(tmp_path: Path, entries: list[Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGEST_PICTURE", 1 << 20)
    good = samples(100)
    path = tar(tmp_path / "0.tar", *good[:80], *entries, *good[80:])
    captions, skipped = read(path)
    assert captions == [f"Picture {i}." for i in range(100)]
    assert skipped == {f"{reason}; the first: {path}: bad": 1}
    with pytest.raises(InputError) as error:
        read(tar(path, *good[:20], *entries))
    assert str(error.value).startswith(f"{path}: bad: {reason} (1 of 11 samples, more than 1%)")


@pytest.mark.parametrize("key", ["../../up", "/root/up", "up\x1b[31m\n", "u" * 300, "caf\udce9"])
def test_names_are_names_alone(tmp_path: Path, key: str) -> None:
    path = tar(tmp_path / "0.tar", (f"{key}.png", png(3)), (f"{key}.txt", b"A CT."))
    (pair,) = shards.pairs_from_shards([path], Counter())
    assert isinstance(pair.image, Member) and int(picture_of(pair.image).pixels[0, 0]) == 3
    assert str(pair.image).isprintable() and pair.image.name.encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(  # a sample takes 2048 bytes
    ("length", "whole", "last"),
    [(4196, 2, "000001"), (4616, 2, "000001"), (4096, 2, "000001"), (8192, 4, "000003"), (0, 0, "")],
    ids=["in a header", "in a picture", "between samples", "without its end", "no byte"],
)
def test_a_shard_that_is_cut_short_is_named_with_its_last_key(tmp_path: Path, length: int, whole: int, last: str) -> None:
    path = tar(tmp_path / "0.tar", *samples(4))
    path.write_bytes(path.read_bytes()[:length])
    damage = f"{path}: cut short or damaged" + (f" after {last}" if last else "")
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{damage} (1 of 1 shards); copy it again")
    captions, skipped = read(path, *(tar(tmp_path / f"{i}.tar", *samples(2)) for i in range(1, 101)))
    assert len(captions) == 200 + whole and skipped == {f"{damage}; what follows is lost": 1}


def raw(kind: bytes, size: int, content: bytes = b"") -> bytes:
    return header("n.png", type=kind, size=size).tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "hostile",
    [
        raw(tarfile.XHDTYPE, 1 << 40, b"15 path=a.png\n"),
        raw(tarfile.XHDTYPE, 21, b"21 size=-99999999999\n") + raw(tarfile.REGTYPE, 0),
        raw(tarfile.XHDTYPE, 14, b"14 path=a.png\n") * 3000,
        raw(tarfile.GNUTYPE_LONGNAME, 1 << 40),
        raw(tarfile.REGTYPE, -2560),  # back to the second sample
        raw(tarfile.GNUTYPE_LONGNAME, -1024),
        raw(tarfile.XHDTYPE, -1024),
        raw(tarfile.REGTYPE, 1 << 50),
        b"\xff" * 512,
    ],
    ids=["pax of 1 TiB", "pax size", "pax chain", "long name", "negative", "negative name", "negative pax", "1 PiB", "no header"],
)
def test_a_hostile_header_ends_the_shard(tmp_path: Path, hostile: bytes) -> None:
    path = tar(tmp_path / "0.tar", *samples(2))
    content = path.read_bytes()
    path.write_bytes(content[:4096] + hostile + content[:4096])
    found, damage = shards.samples_of_shard(path)
    assert damage == f"{path}: cut short or damaged after 000001" and list(found) == ["000000", "000001"]
    path.write_bytes(hostile)
    assert shards.samples_of_shard(path) == ({}, f"{path}: cut short or damaged")


def test_damage_anywhere_is_told_or_harmless(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", *samples(3))
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed[: draw.choice([None, draw.randrange(len(changed))])])
        try:
            for pair in shards.pairs_from_shards([path], Counter()):
                picture_of(pair.image)
        except InputError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()


def test_a_compressed_shard_an_empty_one_and_one_that_changes(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", *samples(3))
    image = shards.pairs_from_shards([path], Counter())[2].image
    whole = path.read_bytes()
    path.write_bytes(whole[:4200])
    with pytest.raises(InputError, match=r"0.tar: 000002.png: the tar file has become shorter; copy it again"):
        picture_of(image)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match=r"0.tar: cut short or damaged \(1 of 1 shards\); .* decompress it"):
        read(path)
    tar(path)
    with pytest.raises(InputError, match="split 'train' is empty"):
        pairs_from_folder(tmp_path, "train")
    path.unlink()
    with pytest.raises(InputError, match=r"0.tar: 000002.png: cannot be read \(No such file"):
        picture_of(image)


def test_a_report_of_shards(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", *samples(3))
    tar(tmp_path / "val-0.tar", *samples(2, 2))
    report = report_from_folder(tmp_path)
    assert (report["dataset"], report["splits"]["train"]["captions"]) == ("WebDataset shards", 3)
    assert [split["images_missing"] for split in report["splits"].values()] == [0, 0]
    assert report["between"][0]["captions"] == 0.5 and report["between"][0]["images_by_picture"] is not None
