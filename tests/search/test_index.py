"""The index file: round trips, what anybody else reads of it, and that nothing cut off, altered or foreign is taken for one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmclip_deploy.errors import BundleError, InputError
from pmclip_deploy.search import index as module
from pmclip_deploy.search.index import BLOCK, HEADER, About, Chunk, Halves, beside, index_from_file, locked, unit, write_index

ABOUT = About("tiny", "ab" * 32, "image", "path")
DIM = 8
HEADERS = ["__metadata__", "schema", "checksum", "embeddings", "ids", "id_ends", "shape"]
NAMES = ["a.png", "sub/b c.dcm", "é", "line\nbreak", "x" * 3000]


def rows(count: int, seed: int = 0) -> Halves:
    wide = np.random.default_rng(seed).normal(size=(count, DIM))
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_index(tmp_path / "x.index", ABOUT, DIM, [(rows(5), NAMES)])
    return tmp_path / "x.index"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        index_from_file(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 250
    return message


# --- what is written is read -----------------------------------------------------------------------------------------------------


def test_round_trip(file: Path) -> None:
    index = index_from_file(file)
    assert (index.about, len(index), index.dim, index.bytes) == (ABOUT, 5, DIM, file.stat().st_size)
    assert np.array_equal(index.embeddings, rows(5)) and list(index.ids()) == NAMES
    assert names(file.parent) == ["x.index"]


def test_the_safetensors_package_reads_it(file: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(file, "numpy") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert metadata["schema"] == "pmclip-deploy/index/1" and metadata["bundle_sha256"] == "ab" * 32
    assert np.array_equal(tensors["embeddings"], rows(5)) and tensors["embeddings"].dtype == np.float16
    text = tensors["ids"].tobytes()
    assert [text[a:b].decode() for a, b in zip([0, *tensors["id_ends"]], tensors["id_ends"], strict=False)] == NAMES


def test_embeddings_begin_on_a_page_and_are_not_copied(file: Path) -> None:
    index = index_from_file(file)
    assert HEADER % 64 == 0 and not index.embeddings.flags.owndata and not index.embeddings.flags.writeable
    assert index.embeddings.__array_interface__["data"][0] % 64 == 0


def test_the_checksum_is_what_the_docstring_says(tmp_path: Path) -> None:
    from hashlib import sha256

    many = rows(BLOCK // (2 * DIM) + 1)
    write_index(tmp_path / "x", ABOUT, DIM, [(many, [str(i) for i in range(len(many))])])
    data, said = (tmp_path / "x").read_bytes(), index_from_file(tmp_path / "x").checksum
    whole = sha256(data[:HEADER].replace(said.encode(), b"0" * 64))
    blocks = [data[start : start + BLOCK] for start in range(HEADER, len(data), BLOCK)]
    for block in blocks:
        whole.update(sha256(block).digest())
    assert len(blocks) > 1 and whole.hexdigest() == said


def test_no_rows(tmp_path: Path) -> None:
    write_index(tmp_path / "x", ABOUT, DIM, [])
    index = index_from_file(tmp_path / "x")
    assert (len(index), index.dim, list(index.ids()), index.matches(np.ones(DIM, np.float32), 3)) == (0, DIM, [], [])


def test_matches_are_the_nearest_first(file: Path) -> None:
    index = index_from_file(file)
    query = rows(1, seed=1)[0].astype(np.float32)
    cosines = rows(5).astype(np.float32) @ query / np.linalg.norm(query) / np.linalg.norm(rows(5).astype(np.float32), axis=1)
    matches = index.matches(query, 3)
    assert [m.id for m in matches] == [NAMES[i] for i in np.argsort(-cosines)[:3]]
    assert [m.score for m in matches] == pytest.approx(sorted(cosines, reverse=True)[:3], abs=1e-6)
    assert len(index.matches(query, 99)) == 5 and matches[0].to_json() == {"id": matches[0].id, "score": matches[0].score}


@pytest.mark.parametrize("part", [1, 100, 3000])
def test_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    chunk = np.tile(rows(50), (9, 1)), [f"{i}" for i in range(450)]  # each row nine times: of equal ones the first comes first
    write_index(tmp_path / "many", ABOUT, chunk[0].shape[1], [chunk])
    query = rows(1, seed=1)[0].astype(np.float32)
    whole = index_from_file(tmp_path / "many").matches(query, 40)
    monkeypatch.setattr("pmclip_deploy.search.index.PART", part)
    index = index_from_file(tmp_path / "many")
    assert index.matches(query, 40) == whole == index.matches(query, 40) and len(index.matches(query, 999)) == 450


def test_unit() -> None:
    assert unit(np.full(4, 3e38, np.float32), "x").tolist() == [0.5] * 4
    assert unit(np.full(4, 1e-38, np.float32), "x").tolist() == pytest.approx([0.5] * 4)
    for bad in (np.zeros(4), np.full(4, np.nan), np.array([np.inf, 1, 1, 1])):
        with pytest.raises(InputError, match=r"^x: its embedding has no direction"):
            unit(bad.astype(np.float32), "x")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(TEXT, max_size=20, unique=True), gone=st.integers(0, 1 << 20), chunk=st.integers(1, 7))
def test_any_ids_in_any_chunks(tmp_path: Path, names: list[str], gone: int, chunk: int) -> None:
    embeddings, path = rows(len(names)), tmp_path / "x"
    chunks = [(embeddings[i : i + chunk], names[i : i + chunk]) for i in range(0, len(names), chunk)]
    write_index(path, ABOUT, DIM, chunks)
    assert list(index_from_file(path).ids()) == names
    removed = frozenset(name for i, name in enumerate(names) if gone >> i & 1)
    write_index(path, ABOUT, DIM, index_from_file(path).chunks(without=removed))
    left = index_from_file(path)
    assert list(left.ids()) == [name for name in names if name not in removed]
    assert np.array_equal(left.embeddings, embeddings[[i for i, name in enumerate(names) if name not in removed]])


def test_more_rows_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    write_index(tmp_path / "x", ABOUT, DIM, [(rows(5), NAMES)])
    assert [len(ids) for _, ids in index_from_file(tmp_path / "x").chunks()] == [2, 2, 1]
    write_index(tmp_path / "x", ABOUT, DIM, index_from_file(tmp_path / "x").chunks())
    assert list(index_from_file(tmp_path / "x").ids()) == NAMES


def test_a_long_name_of_a_bundle_leaves_the_header_room(tmp_path: Path) -> None:
    write_index(tmp_path / "x", replace(ABOUT, bundle="\U0001f600" * 5000), DIM, [(rows(5), NAMES)])
    assert index_from_file(tmp_path / "x").about.bundle == "\U0001f600" * 200


# --- what is no whole index is refused -------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(file: Path) -> None:
    data = file.read_bytes()
    embeddings, ends = HEADER, HEADER + 5 * DIM * 2
    cuts = {0, 1, 7, 8, 9, 100, HEADER - 1, HEADER, embeddings + 1, ends - 1, ends, ends + 39, ends + 40, len(data) - 1}
    for cut in sorted(cuts | set(range(1, len(data), 97))):
        file.write_bytes(data[:cut])
        assert "not a usable index" in refused(file)
    file.write_bytes(data + b"\0")
    assert "bytes" in refused(file)


def test_every_flipped_byte_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    text = data[8:].index(b"   ")  # the end of the JSON
    embeddings, ends, ids = (HEADER + offset for offset in (0, 80, 120))
    edges = [0, 7, 8, text + 8, HEADER - 1, embeddings, ends - 1, ends, ids - 1, ids, len(data) - 1]
    for at in sorted({*edges, *range(0, text + 8, 3), *range(HEADER, len(data), 41)}):
        for bit in (1, 32):
            data[at] ^= bit
            file.write_bytes(data)
            refused(file)
            data[at] ^= bit
    file.write_bytes(data)
    assert len(index_from_file(file)) == 5


def test_an_altered_header_with_all_else_right_is_refused(file: Path) -> None:
    """Another bundle's hash in the metadata, of the same length: the checksum covers the header."""
    file.write_bytes(file.read_bytes().replace(b"ab" * 32, b"cd" * 32))
    assert "checksum" in refused(file)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(HEADERS), x, max_size=7),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.one_of(st.binary(max_size=200), JSON.map(json.dumps).map(str.encode)))
def test_no_header_breaks_the_reader(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes((HEADER - 8).to_bytes(8, "little") + head[: HEADER - 8].ljust(HEADER - 8) + b"\0" * 64)
    refused(path)


def test_wrong_types_in_the_header(tmp_path: Path) -> None:
    good = {"schema": "pmclip-deploy/index/1", "checksum": "0" * 64}
    tensors = module._tensors(2, 4, 3)
    for tensor, shape in (
        ("embeddings", [2]),
        ("embeddings", [-1, 4]),
        ("embeddings", ["2", 4]),
        ("ids", None),
        ("ids", [True]),
        ("ids", [9]),
    ):
        document = {"__metadata__": good, **tensors, tensor: {**tensors[tensor], "shape": shape}}
        (tmp_path / "x").write_bytes((HEADER - 8).to_bytes(8, "little") + json.dumps(document).encode().ljust(HEADER - 8) + bytes(64))
        refused(tmp_path / "x")
    schemas: list[Any] = [1, "\n", "z" * 999]
    for metadata in (None, [], {}, *({**good, "schema": x} for x in schemas), {**good, "checksum": 3}, {**good, "checksum": ""}):
        document = {"__metadata__": metadata, **tensors}
        (tmp_path / "x").write_bytes((HEADER - 8).to_bytes(8, "little") + json.dumps(document).encode().ljust(HEADER - 8) + bytes(35))
        refused(tmp_path / "x")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"embeddings": rows(500)}, tmp_path / "weights")
    assert "not a usable index" in refused(tmp_path / "weights")
    (tmp_path / "text").write_text("x" * 9999)
    assert "not a usable index" in refused(tmp_path / "text")
    for missing in (tmp_path, tmp_path / "nowhere"):
        assert "no such index" in refused(missing)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")


def test_a_disk_that_fails_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "sha256", fails)
    assert "cannot be read (Input/output error)" in refused(file)


def test_another_bundle(file: Path) -> None:
    index = index_from_file(file)
    index.refuse_other_bundle("tiny", "ab" * 32)
    with pytest.raises(BundleError, match=r"bundle tiny abababababab, and this one is other cdcdcdcdcdcd;"):
        index.refuse_other_bundle("other", "cd" * 32)
    with pytest.raises(BundleError, match="without a manifest"):
        index.refuse_other_bundle("other", "")


# --- writing is all or nothing -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_an_index_is_private_and_keeps_the_permissions_it_is_given(file: Path) -> None:
    """While it is written, too, and where a process that died left a file that all may read."""
    seen = list[int]()

    def chunks() -> Iterator[Chunk]:
        seen.append(beside(file, "new").stat().st_mode & 0o777)
        yield rows(1), ["p"]

    assert file.stat().st_mode & 0o777 == 0o600
    for mode in (0o600, 0o640, 0o664):
        file.chmod(mode)
        beside(file, "new").touch(0o644)
        write_index(file, ABOUT, DIM, chunks())
        assert file.stat().st_mode & 0o777 == mode and seen.pop() == 0o600


def test_a_failed_write_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def broken() -> Iterator[Chunk]:
        yield rows(2), ["p", "q"]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_index(file, ABOUT, DIM, broken())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device\)"):
        write_index(file, ABOUT, DIM, [(rows(1), ["p"])])
    assert file.read_bytes() == before and names(file.parent) == ["x.index"]


def test_a_process_that_dies_while_writing_keeps_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    code = (
        "import os, sys; from pathlib import Path; from pmclip_deploy.search.index import *\n"
        "os.fsync = lambda handle: os._exit(9)\n"
        "path = Path(sys.argv[1]); index = index_from_file(path)\n"
        "with locked(path): write_index(path, index.about, index.dim, index.chunks())"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)], timeout=60).returncode == 9
    assert file.read_bytes() == before and beside(file, "new").exists()
    with locked(file):  # which the dead process held
        write_index(file, ABOUT, DIM, [(rows(1), ["p"])])
    assert list(index_from_file(file).ids()) == ["p"] and names(file.parent) == ["x.index"]


def test_a_reader_keeps_what_it_opened(file: Path) -> None:
    index = index_from_file(file)
    if os.name == "posix":  # Windows refuses the write instead
        write_index(file, ABOUT, DIM, [(rows(1), ["p"])])
        assert np.array_equal(index.embeddings, rows(5)) and list(index.ids()) == NAMES


def test_one_writer_at_a_time(file: Path) -> None:
    with locked(file), pytest.raises(BundleError, match=r"another process is writing to it; wait"), locked(file):
        pass
    with locked(file):
        pass
    assert names(file.parent) == ["x.index"]
    with pytest.raises(BundleError, match="cannot be written"), locked(file / "below"):
        pass


def test_the_lock_holds_against_many(file: Path) -> None:
    inside, most, got = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, got
        for _ in range(200):
            try:
                with locked(file):
                    with guard:
                        inside += 1
                        most, got = max(most, inside), got + 1
                    with guard:
                        inside -= 1
            except BundleError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and got > 0 and names(file.parent) == ["x.index"]


# --- memory ------------------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
from pmclip_deploy import kernels
from pmclip_deploy.search.index import index_from_file

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
index = index_from_file(sys.argv[1])
assert index.id(len(index) - 1) == f"study/{len(index) - 1}.dcm"
assert index.matches(index.embeddings[7].astype(np.float32), 1)[0].id == "study/7.dcm"
print(peak() - before, index.bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_search_takes_less_memory_than_the_file(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(4000, 128)).astype(np.float16)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, 800_000, 4000):
            yield wide + np.float16(start / 1e6), [f"study/{start + i}.dcm" for i in range(4000)]

    write_index(tmp_path / "x", ABOUT, 128, chunks())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "x")], capture_output=True, text=True, timeout=60)
    grown, size = map(int, done.stdout.split())
    assert size > 200e6 and grown < 0.75 * size, done.stderr
