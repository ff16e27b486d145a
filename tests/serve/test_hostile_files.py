"""Hostile files: one clear message each, the service stays up, and others are served meanwhile.

All of them are nightly; some of each kind run by default.
"""

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.patient import PATIENT
from tests.serve.running import Running
from tests.serve.watcher import FRACTURE, LEG, Watcher, clear

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")

from tests.imaging.test_budgets import PIXEL_DATA, SMALL, dicom, element, image, j2k, png_of, zlib_raw


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("leg.dcm", LEG)
    return file.getvalue()


def marked() -> bytes:
    """A radiograph with the markers of a patient."""
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRLittleEndian

    dataset, out = dcmread(io.BytesIO(LEG)), io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in PATIENT.items():
            setattr(dataset, keyword, value)
        dataset.save_as(out, enforce_file_format=False)
    return out.getvalue()


MARKED = marked()


def mutated(seed: int) -> bytes:
    """A radiograph with some other bytes, mostly in its header, and sometimes cut."""
    chance, data = random.Random(seed), bytearray(MARKED)
    for _ in range(chance.choice([1, 2, 4, 16, 64])):
        data[chance.randrange(132, chance.choice([2500, len(data)]))] = chance.choice([0, 255, chance.randrange(256)])
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data)


QUICK: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a byte": lambda: b"\0",
    "HTML": lambda: b"<html><script>alert('ZQX')</script></html>",
    "a pickle": lambda: pickle.dumps({"ZQX": print}),
    "a zip": archive,
    "gzip": lambda: zlib.compress(LEG, wbits=31),
    "a path": lambda: b"../../../../etc/passwd",
    "a JSON document": lambda: json.dumps({"ZQX": [1]}).encode(),
    "a preamble": lambda: bytes(128) + b"DICM",
    "PNG's first bytes": lambda: b"\x89PNG\r\n\x1a\n",
    "JPEG's first bytes": lambda: b"\xff\xd8\xff\xe0",
    "JPEG of zeros": lambda: b"\xff\xd8\xff\xe0" + bytes(1 << 20),
    "a million frames": lambda: dicom(image(frames=10**6) + PIXEL_DATA),
    "a million frames, deflated": lambda: dicom(zlib_raw(image(frames=10**6) + PIXEL_DATA), b"1.2.840.10008.1.2.1.99"),
    "no pixels": lambda: dicom(image(65535)),
    "another transfer syntax": lambda: dicom(image() + PIXEL_DATA, b"1.2.840.10008.1.2.4.9999"),
    "a transfer syntax of text": lambda: dicom(image() + PIXEL_DATA, b"../ZQX\nZQX"),
    "a report": lambda: dicom(element(0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.88.11") + element(0x00080060, b"CS", b"SR")),
    "a PNG bomb": lambda: png_of(8192)[:2000],
    "a PNG of another size": lambda: png_of(256)[:16] + struct.pack(">2L", 60000, 60000) + png_of(256)[24:],
    **{f"cut at {size}": lambda size=size: MARKED[:size] for size in (131, 140, 500, 1500, len(MARKED) // 2, len(MARKED) - 1)},  # type: ignore[misc]
    **{f"mutated {seed}": lambda seed=seed: mutated(seed) for seed in range(6)},  # type: ignore[misc]
    **{name: SMALL[name] for name in (
        "palette of empty segments", "lists in Window Center under a megabyte", "a list in the rescale", "sequences in sequences",
        "RLE segments", "RLE segments over one another", "a JPEG 2000 code block a sample", "frames",
    )},
}  # fmt: skip


def ask_all_ways(service: Running, data: bytes, name: str) -> int:
    """A file through each route that reads one. Returns the status of the first."""
    asked, kept = service.ask(data, FRACTURE), service.keep(data)
    replies = [asked, kept, service.client.post("/v1/classify", files={"image": data}, data={"labels": ["ct", "mr"]})]
    if kept.status_code == 201:
        about, here = kept.json(), f"/v1/images/{kept.json()['id']}"
        of_frame = f"{here}/frames/{about['frame']}"
        paths = (of_frame, f"{of_frame}/table", f"{here}/thumbnail", f"{here}/view", f"{here}/view?finding=fracture", f"{here}/patient")
        replies += [service.client.get(path) for path in paths]
        replies.append(service.client.post(f"{here}/report", json={"questions": [FRACTURE]}))
        service.client.delete(here)
    for reply in replies:
        clear(reply, name)
    assert asked.status_code < 400 or asked.json()["detail"].startswith("the upload: "), (name, asked.text)
    assert (asked.status_code < 400) == (kept.status_code < 400), name
    return asked.status_code


def test_files(watched: Running) -> None:
    found = {name: ask_all_ways(watched, make(), name) for name, make in QUICK.items()}
    for name, status in found.items():
        assert status in ((200, 415, 422) if name.startswith("mutated") else (415, 422)), (name, status)


def every_file(shared: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield from ((name, make()) for name, make in SMALL.items())
    faults = shared.parent / "faults"
    if faults.is_dir():
        subprocess.run([sys.executable, faults / "hostile.py", folder], check=True)
    for path in (*(shared / "dicom").rglob("*"), *faults.rglob("*"), *folder.iterdir()):
        if path.is_file():
            yield path.name, path.read_bytes()
    yield from ((f"mutated {seed}", mutated(seed)) for seed in range(6, 200))


@pytest.mark.nightly
def test_every_file_there_is(service: Running, shared: Path, tmp_path: Path) -> None:
    for name, data in every_file(shared, tmp_path):
        print(name, end=": ", flush=True)
        with Watcher(service):  # when the file is made: making some of them takes this process for seconds
            ask_all_ways(service, data, name)
    for name, data in (("PNG", png_of(8192, 16, 2)), ("JPEG 2000", j2k(3, mct=1)), ("beyond the limit", bytes(257 << 20))):
        with Watcher(service):
            clear(service.ask(data, FRACTURE), name)
